"""Embeddings of diffusion times and class labels."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from dar_jax.common.typing import Array, Float, Int, PRNGKeyArray
from dar_jax.nn.compute import Compute
from dar_jax.nn.layers import BLOCK_INIT

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


def embedding(num: int, dim: int, *, compute: Compute, rngs: nnx.Rngs, init=BLOCK_INIT):
    """Lookup table [num, dim]. Class tables have a last row for the null label `num_classes`."""
    return nnx.Embed(num, dim, dtype=compute.jnp_dtype, embedding_init=init, rngs=rngs)


def drop_labels(
    labels: Int[Array, " B"], rate: float, null_label: int, rng: PRNGKeyArray
) -> Int[Array, " B"]:
    """Replace each label by the null label with probability `rate` (guidance training)."""
    return jnp.where(jax.random.uniform(rng, labels.shape) < rate, null_label, labels)
