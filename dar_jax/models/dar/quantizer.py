"""Vector quantisation on the unit sphere with a straight-through gradient.

Codes and codebook rows are l2-normalised (ViT-VQGAN, Yu et al. 2021); follows the reference's
`VectorQuantizer` with `l2_norm`. Everything here is float32: neighbouring codes differ by less
than bfloat16 resolves.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dar_jax.common.typing import Array, Float, Int

NORM_EPSILON = 1e-12
COMMITMENT_WEIGHT = 0.25
ENTROPY_TEMPERATURE = 0.01
ENTROPY_EPSILON = 1e-5
DEAD_STD = 1e-5


class Quantized(NamedTuple):
    """Result of quantisation.

    Attributes:
        indices: int32 [B, N], rows of the codebook; None where there is none.
        codes: float32 [B, N, C]; equal to `nearest`, with the gradient of `z`.
        z: float32 [B, N, C], the normalised input.
        nearest: float32 [B, N, C], the normalised codebook rows.
    """

    indices: Array | None
    codes: Array
    z: Array
    nearest: Array

    @property
    def tokens(self) -> Array:
        """What an image is decoded from: indices, or codes where there is no codebook."""
        return self.codes if self.indices is None else self.indices


class QuantizationLosses(NamedTuple):
    """Scalars: `codebook` moves the codes towards z, `commitment` moves z (times 0.25)."""

    codebook: Array
    commitment: Array


class Quantizer(nnx.Module):
    """Codebook of `codebook_size` unit vectors of `code_dim` channels."""

    def __init__(self, codebook_size: int, code_dim: int, *, rngs: nnx.Rngs):
        rows = jax.random.uniform(rngs.params(), (codebook_size, code_dim), minval=-1.0, maxval=1.0)
        self.codebook = nnx.Param(l2_normalize(rows))

    def __call__(self, z: Float[Array, "B N C"]) -> Quantized:
        """Quantise z to the nearest code; the first index wins ties."""
        z = l2_normalize(z.astype(jnp.float32))
        indices = jnp.argmin(self.distances(z), axis=-1).astype(jnp.int32)
        nearest = self.lookup(indices)
        codes = z + jax.lax.stop_gradient(nearest - z)
        return Quantized(indices, codes, z, nearest)

    def distances(self, z: Float[Array, "B N C"]) -> Float[Array, "B N V"]:
        """Squared distances of normalised z to all normalised codes."""
        codebook = l2_normalize(self.codebook[...])
        products = jnp.einsum("bnc,vc->bnv", z, codebook, precision=jax.lax.Precision.HIGHEST)
        squares = jnp.sum(z**2, axis=-1, keepdims=True) + jnp.sum(codebook**2, axis=-1)
        return squares - 2 * products

    def lookup(self, indices: Int[Array, "B N"]) -> Float[Array, "B N C"]:
        """Return the normalised codes of `indices`."""
        return l2_normalize(self.codebook[...][indices])

    def between(self, ends: Int[Array, "2 N"], weights: Float[Array, " S"]) -> Int[Array, "S N"]:
        """Return the codes nearest to the great circles from the first (weight 0) to the second."""
        start, end = self.lookup(ends)
        way = l2_normalize(start + weights[:, None, None] * (end - start))
        return jnp.argmin(self.distances(way), axis=-1).astype(jnp.int32)


def normalized(z: Float[Array, "B N C"]) -> Quantized:
    """Leave z continuous on the unit sphere: it is its own nearest code."""
    z = l2_normalize(z.astype(jnp.float32))
    return Quantized(None, z, z, z)


def l2_normalize(x: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
    """Divide by the norm along the last axis, at least 1e-12."""
    # The norm is guarded before the root: its gradient at zero would be NaN.
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, NORM_EPSILON**2))


def quantization_losses(quantized: Quantized, last_query: Int[Array, " B"]) -> QuantizationLosses:
    """Masked losses: token n of sample b counts iff n <= last_query[b].

    Tokens past the selected window take no part in the sample's reconstruction. The mean runs
    over all counted tokens of the batch, not over per-sample means.
    """
    counted = jnp.arange(quantized.z.shape[1]) <= last_query[:, None]

    def masked_mean(error: Array) -> Array:
        return jnp.sum(jnp.mean(error**2, axis=-1) * counted) / jnp.sum(counted)

    stop = jax.lax.stop_gradient
    return QuantizationLosses(
        codebook=masked_mean(quantized.nearest - stop(quantized.z)),
        commitment=COMMITMENT_WEIGHT * masked_mean(stop(quantized.nearest) - quantized.z),
    )


def entropy_loss(distances: Float[Array, "B N V"]) -> Float[Array, ""]:
    """Mean entropy of the soft assignment of every token minus the entropy of the mean one.

    Low when each token is decided and all codes are used. The released tokenizer was trained
    without it (the reference fixes its weight to 0).
    """
    log_probs = jax.nn.log_softmax(-distances / ENTROPY_TEMPERATURE, axis=-1)
    probs = jnp.exp(log_probs)
    sample_entropy = -jnp.mean(jnp.sum(probs * log_probs, axis=-1))
    mean_probs = jnp.mean(probs, axis=(0, 1))
    return sample_entropy + jnp.sum(mean_probs * jnp.log(mean_probs + ENTROPY_EPSILON))


def dead_code_rate(codes: Float[Array, "B N C"]) -> Float[Array, ""]:
    """Share of positions whose codes do not vary over the batch."""
    return jnp.mean((jnp.std(codes, axis=0, ddof=1) < DEAD_STD).astype(jnp.float32))
