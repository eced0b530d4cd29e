"""Time grids, the resolution-dependent time shift and logit-normal draws (Esser et al. 2024,
arXiv:2403.03206, sections 5.3.2 and 3.1)."""

import numbers

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.common.checks import check_number
from dar_jax.common.typing import AnyArray, Array, Float

LAST_NOISE = 0.04
"""Distance from the data at which a stochastic run takes its last step (reference: `last_step_size`
of SiT)."""


MAX_STEPS = 10_000
"""Of a solver; more only exhaust the memory."""


def check_num_steps(num_steps: int, least: int = 1) -> None:
    """Raise ValueError unless a number of steps is in `least` .. `MAX_STEPS`."""
    check_number("num_steps", num_steps, numbers.Integral)
    if not least <= num_steps <= MAX_STEPS:
        own = " (0 is the model's own)" if least == 0 else ""
        raise ValueError(f"num_steps={num_steps} must be in 1..{MAX_STEPS}{own}")


def shift_times(t: AnyArray, shift: float) -> AnyArray:
    """Map t to t / (t + shift * (1 - t)): shift > 1 spends more time near the noise.

    0 and 1 are fixed points. The same map applies to training draws and to the sampling grid.
    """
    return t / (t + shift * (1 - t))


def shifted_grid(num_steps: int, shift: float) -> Float[np.ndarray, " times"]:
    """Return the num_steps + 1 shifted times from 0 to 1, float32."""
    return shift_times(np.arange(num_steps + 1) / num_steps, shift).astype(np.float32)


def stochastic_grid(num_steps: int) -> Float[np.ndarray, " times"]:
    """Return the num_steps + 1 times of Euler-Maruyama: even up to 1 - `LAST_NOISE`, then 1."""
    noise = np.append(np.linspace(1.0, LAST_NOISE, num_steps), 0.0)
    return (1 - noise).astype(np.float32)


def logit_normal_times(
    normal: Float[Array, "..."], num_levels: int | None = None
) -> Float[Array, "..."]:
    """Map standard normal draws s to times 1 - sigmoid(s).

    Args:
        normal: s; large ones are near the noise.
        num_levels: quantise the distance from the data, 1 - t, downwards to multiples of
            1 / num_levels, as TransDiff's integer time steps are; None is continuous.
    """
    noise = jax.nn.sigmoid(normal)
    if num_levels is not None:
        noise = jnp.trunc(num_levels * noise) / num_levels
    return 1 - noise
