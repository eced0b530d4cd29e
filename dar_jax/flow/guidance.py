"""Classifier-free guidance of a velocity, outside of any solver (Ho & Salimans 2022).

    guided = null + scale * (conditional - null)

Whatever is affine in the velocity at one x, such as the drift of the stochastic equation, is guided
by the same rule, so it does not matter which of the two is.
"""

from collections.abc import Callable

import einops
import jax.numpy as jnp

from dar_jax.common.typing import Any, Array

VelocityFn = Callable[[Array, Array, Any], Array]
"""Maps (x [B, ...], t [B], condition) to a velocity like x."""
ALWAYS = (0.0, 1.0)


def guide(
    velocity_fn: VelocityFn, scale: float | Array, interval: tuple[float, float]
) -> VelocityFn:
    """Return the guided velocity, whose condition has two rows per image.

    Args:
        velocity_fn: the model's; it sees each image twice, first with its condition, then with the
            null condition.
        scale: 1 is the conditional velocity, which needs no guidance.
        interval: first and last time that is guided, both included; outside, the velocity is the
            conditional one.
    """

    def guided(x: Array, t: Array, condition: Any) -> Array:
        # Two rows of one image lie side by side, so that a batch split over devices stays split.
        rows, times = (einops.repeat(a, "b ... -> (b two) ...", two=2) for a in (x, t))
        both = velocity_fn(rows, times, condition)
        conditional, null = einops.rearrange(both, "(b two) ... -> two b ...", two=2)
        inside = (interval[0] <= t) & (t <= interval[1])
        inside = einops.rearrange(inside, f"b -> b {'1 ' * (x.ndim - 1)}")
        return jnp.where(inside, null + scale * (conditional - null), conditional)

    return guided
