"""Layers of text encoders on weights by their names on the hub, matrices as [out, in]."""

from collections.abc import Mapping, Sequence

import einops
import jax
import jax.numpy as jnp

from dar_jax.common.typing import Array, Bool, Float

Weights = Mapping[str, Array]


def linear(weights: Weights, name: str, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
    """Multiply by `NAME.weight` and add `NAME.bias`, if there is one."""
    y = x @ weights[f"{name}.weight"].T
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + bias


def norm(
    weights: Weights, name: str, x: Float[Array, "*B D"], epsilon: float
) -> Float[Array, "*B D"]:
    """Take away the mean and divide by the standard deviation, then scale and shift."""
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    x = (x - mean) * jax.lax.rsqrt(variance + epsilon)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attention(
    weights: Weights,
    names: Sequence[str],
    x: Float[Array, "B T D"],
    *,
    num_heads: int,
    allowed: Bool[Array, "_ _ _ _"],
    scale: float | None = None,
    bias: Array | float = 0.0,
) -> Float[Array, "B T D"]:
    """Attend with several heads.

    Args:
        weights: by name.
        names: of the projections to queries, keys and values, and of that of the result.
        x: what attends to itself.
        num_heads: of as many parts of the projections.
        allowed: who (axis 2) may attend to whom (axis 3), like the scores or broadcast to them.
        scale: of the scores; None: one over the root of a head's width.
        bias: added to them.
    """
    q, k, v = (
        einops.rearrange(linear(weights, name, x), "b t (h d) -> b h t d", h=num_heads)
        for name in names[:3]
    )
    scores = q @ k.swapaxes(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
    scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
    out = einops.rearrange(jax.nn.softmax(scores, -1) @ v, "b h t d -> b t (h d)")
    return linear(weights, names[3], out)
