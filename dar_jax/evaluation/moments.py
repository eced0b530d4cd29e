"""Mean and covariance of features, batch by batch, in float64 on the host.

Two parts of a set give those of the whole (Chan, Golub & LeVeque 1983), whatever the parts are:
batches, devices or processes.

    count   = n_a + n_b,      delta = mean_b - mean_a
    mean    = mean_a + delta n_b / count
    scatter = scatter_a + scatter_b + delta delta^T n_a n_b / count
    covariance = scatter / (count - 1)
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from dar_jax.common.typing import Float

CHUNK = 4096
"""Rows that are in memory in float64 at once."""


class Gaussian(NamedTuple):
    """A normal distribution over features.

    Attributes:
        mean: [D] float64.
        covariance: [D, D] float64.
    """

    mean: Float[np.ndarray, " D"]
    covariance: Float[np.ndarray, "D D"]


@dataclasses.dataclass(frozen=True)
class Moments:
    """Number, mean and scatter matrix of feature vectors; `a + b` are those of both sets.

    Attributes:
        count: number of vectors.
        mean: [D] float64.
        scatter: [D, D] float64, the sum of (x - mean) (x - mean)^T.
    """

    count: int
    mean: Float[np.ndarray, " D"]
    scatter: Float[np.ndarray, "D D"]

    @classmethod
    def of(cls, features: Float[np.ndarray, "N D"]) -> "Moments":
        """Moments of the rows of `features`; of no rows, those that `+` ignores."""
        dim = features.shape[1]
        total = cls(0, np.zeros(dim), np.zeros((dim, dim)))
        for first in range(0, len(features), CHUNK):
            chunk = features[first : first + CHUNK].astype(np.float64)
            mean = chunk.mean(axis=0)
            total += cls(len(chunk), mean, (chunk - mean).T @ (chunk - mean))
        return total

    def __add__(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        delta = other.mean - self.mean
        share = other.count / max(count, 1)
        between = np.outer(delta, delta * (self.count * share))
        return Moments(count, self.mean + delta * share, self.scatter + other.scatter + between)

    def gaussian(self) -> Gaussian:
        """Return the mean and the unbiased covariance.

        Raises:
            ValueError: there are fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        return Gaussian(self.mean, self.scatter / (self.count - 1))
