"""Frechet distance between two normal distributions: FID, sFID and their kin on other features.

Heusel et al. 2017, arXiv:1706.08500, equation 6:

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

The trace of the root is the sum of the singular values of R_a^T R_b with C = R R^T. The reference
implementations take the root of the product C_a C_b, whose rounding errors grow to their square
roots where a covariance has no full rank, as with fewer images than features.
"""

import numpy as np

from dar_jax.common.checks import check_finite, check_shape
from dar_jax.common.typing import Float
from dar_jax.evaluation.moments import Gaussian


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared 2-Wasserstein distance of two normal distributions, at any rank, in float64.

    Raises:
        ValueError: their features differ in number, or are not finite.
    """
    check_shape("mean of the second distribution", b.mean, a.mean.shape)
    for place, gaussian in (("first", a), ("second", b)):
        check_finite(f"mean of the {place} distribution", gaussian.mean)
        check_finite(f"covariance of the {place} distribution", gaussian.covariance)
    difference = a.mean.astype(np.float64) - b.mean
    spread = np.trace(a.covariance) + np.trace(b.covariance)
    singular_values = np.linalg.svd(root(a.covariance).T @ root(b.covariance), compute_uv=False)
    return max(0.0, float(difference @ difference + spread - 2 * singular_values.sum()))


def root(covariance: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "D rank"]:
    """Factor R, float64, with R R^T = `covariance`, without directions that are but rounding."""
    values, vectors = np.linalg.eigh(covariance.astype(np.float64))
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])
