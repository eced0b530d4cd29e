"""Adaptive layer norm: a condition shifts, scales and gates a branch (Peebles & Xie 2022)."""

from dar_jax.common.typing import Array, Float


def modulate(x: Float[Array, "B N D"], shift: Array, scale: Array) -> Float[Array, "B N D"]:
    """Return `x * (1 + scale) + shift`; shift and scale broadcast against x."""
    return x * (1 + scale) + shift
