"""Kernel Inception distance (Binkowski et al. 2018, arXiv:1801.01401, section 4).

The unbiased squared maximum mean discrepancy of random subsets x, y of m images each under the
kernel k(x, y) = (x.y / D + 1)^3:

    sum_{i != j} (k(x_i, x_j) + k(y_i, y_j)) / (m (m - 1)) - 2 sum_{i, j} k(x_i, y_j) / m^2
"""

import numpy as np

from dar_jax.common.typing import Float

SUBSETS = 100
SUBSET_SIZE = 1000
DEGREE = 3


def kid(
    a: Float[np.ndarray, "N D"],
    b: Float[np.ndarray, "M D"],
    rng: np.random.Generator | np.random.RandomState,
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
) -> tuple[float, float]:
    """Mean and standard deviation of the distance over random subsets, computed in float64.

    Args:
        a: features of generated images.
        b: features of real images.
        rng: draws the subsets; `numpy.random.RandomState(2020)` draws those of torch-fidelity.
        subsets: how many are compared.
        subset_size: images of each kind in a subset.

    Raises:
        ValueError: there are fewer images than a subset needs.
    """
    if not 2 <= subset_size <= min(len(a), len(b)):
        raise ValueError(
            f"KID of {len(a)} and {len(b)} images needs subsets of 2 to {min(len(a), len(b))}, "
            f"not {subset_size}"
        )
    distances = [
        _squared_discrepancy(
            *(x[rng.choice(len(x), subset_size, replace=False)].astype(np.float64) for x in (a, b))
        )
        for _ in range(subsets)
    ]
    return float(np.mean(distances)), float(np.std(distances))


def _squared_discrepancy(x: Float[np.ndarray, "M D"], y: Float[np.ndarray, "M D"]) -> float:
    count = len(x)
    within = sum(kernel.sum() - np.trace(kernel) for kernel in (_kernel(x, x), _kernel(y, y)))
    return within / (count * (count - 1)) - 2 * _kernel(x, y).mean()


def _kernel(x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "M D"]) -> Float[np.ndarray, "N M"]:
    return (x @ y.T / x.shape[1] + 1) ** DEGREE
