"""Embedding of diffusion times."""

import math

import jax.numpy as jnp

from dar_jax.common.typing import Array, Float

TIME_SCALE = 1000.0
"""Times in [0, 1] are spread over the range that the sinusoids were designed for."""
MAX_PERIOD = 10000.0


def timestep_features(t: Float[Array, " B"], dim: int) -> Float[Array, "B D"]:
    """Sinusoidal features of t in [0, 1], cosines first, float32.

    With half = dim / 2 and k = 0 .. half - 1: cos(1000 t w_k), sin(1000 t w_k),
    w_k = exp(-ln(10000) k / half).
    """
    half = dim // 2
    frequencies = jnp.exp(-math.log(MAX_PERIOD) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = TIME_SCALE * t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
