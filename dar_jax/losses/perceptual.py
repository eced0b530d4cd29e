"""LPIPS distance on given features (Zhang et al. 2018, arXiv:1801.03924, section 3).

    level_l(a, b) = mean over positions of  sum_c w_lc (unit(a_l)_c - unit(b_l)_c)^2
    lpips(a, b)   = sum_l level_l(a, b),      unit(f) = f / (|f| + 1e-10)

The network that makes features and weights is `models.frozen.lpips`.

Difference from the reference: where a feature vector is entirely zero the gradient is zero here
and NaN there; values are equal.
"""

from collections.abc import Sequence

import jax.numpy as jnp

from dar_jax.common.typing import Array, Float

NORM_EPSILON = 1e-10


def level_distances(
    features_a: Sequence[Float[Array, "B _ _ _"]],
    features_b: Sequence[Float[Array, "B _ _ _"]],
    weights: Sequence[Float[Array, " _"]],
) -> Float[Array, "levels B"]:
    """Contribution of each feature level to the distance, float32.

    Args:
        features_a: one map [B, H_l, W_l, C_l] per level.
        features_b: the same for the other image.
        weights: one non-negative vector [C_l] per level.
    """
    levels = zip(features_a, features_b, weights, strict=True)
    return jnp.stack([_level_distance(a, b, weight) for a, b, weight in levels])


def perceptual_distance(
    features_a: Sequence[Float[Array, "B _ _ _"]],
    features_b: Sequence[Float[Array, "B _ _ _"]],
    weights: Sequence[Float[Array, " _"]],
) -> Float[Array, " B"]:
    """LPIPS of each pair of images, float32; arguments as in `level_distances`."""
    return jnp.sum(level_distances(features_a, features_b, weights), axis=0)


def _level_distance(
    a: Float[Array, "B H W C"], b: Float[Array, "B H W C"], weight: Float[Array, " C"]
) -> Float[Array, " B"]:
    difference = jnp.square(_unit(a) - _unit(b))
    return jnp.mean(jnp.sum(difference * weight, axis=-1), axis=(1, 2))


def _unit(features: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    features = features.astype(jnp.float32)
    square = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    positive = square > 0.0
    # sqrt has no finite gradient at 0, and where() does not hide it without a safe argument.
    norm = jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)
    return features / (norm + NORM_EPSILON)
