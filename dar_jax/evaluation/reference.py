"""Statistics of real images that generated ones are compared to, from files or from images.

Three kinds of `.npz` are read, by the arrays that they hold:

    mu, sigma                     mean and covariance of the pool features: FID; those of
                                  pytorch-fid, clean-fid and others hold nothing else
    mu_s, sigma_s                 of the spatial features: sFID
    arr_0                         images: precision, recall, KID, and all that is not there
    feats                         pool features of images, as clean-fid's files for KID

The ADM evaluation suite's reference batches hold the first five; its statistics are of the whole
training set, its images are 10,000 of them. `save` writes `mu`, `sigma`, `mu_s`, `sigma_s` and
`feats`, and the name of the features.
"""

import dataclasses
import os
from collections.abc import Mapping

import numpy as np

from dar_jax.common import storage
from dar_jax.common.checks import check_finite
from dar_jax.common.files import ARCHIVE_ERRORS, write_npz
from dar_jax.common.typing import Float
from dar_jax.evaluation.features import Extractor
from dar_jax.evaluation.moments import Gaussian, Moments
from dar_jax.evaluation.npz_images import ARRAY

GAUSSIANS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
FEATURES = "feats"
EXTRACTOR = "extractor"


@dataclasses.dataclass(frozen=True)
class ReferenceStatistics:
    """What is known of the real images; None is what is not.

    Attributes:
        pool: distribution of the pool features.
        spatial: of the spatial features.
        features: pool features of single images, float32 [N, D].
    """

    pool: Gaussian | None = None
    spatial: Gaussian | None = None
    features: Float[np.ndarray, "N D"] | None = None

    @classmethod
    def of(cls, features: Mapping[str, Float[np.ndarray, "N _"]]) -> "ReferenceStatistics":
        """Compute all from the features of real images, by their kind.

        Raises:
            ValueError: there are fewer than two images.
        """
        gaussians = {
            kind: Moments.of(features[kind]).gaussian() for kind in GAUSSIANS if kind in features
        }
        return cls(**gaussians, features=features["pool"])

    @classmethod
    def load(cls, path: str | os.PathLike, extractor: Extractor) -> "ReferenceStatistics":
        """Read what a file knows, see the module; of its images nothing is computed.

        Args:
            path: an `.npz`.
            extractor: the features must be of its kind.

        Raises:
            ValueError: the file is unreadable, holds other features or numbers that are not
                finite, or neither statistics nor images.
        """
        arrays, names = _read_arrays(path)
        found = str(arrays.get(EXTRACTOR, extractor.identity))
        if found != extractor.identity:
            raise ValueError(f"{path} holds features of {found}, expected {extractor.identity}")
        for name, array in arrays.items():
            if name != EXTRACTOR:
                check_finite(f"{path}: {name}", array)
        gaussians = {kind: _gaussian(path, arrays, kind, extractor) for kind in GAUSSIANS}
        features = _features(path, arrays, extractor)
        if gaussians["pool"] is None and ARRAY not in names:
            raise ValueError(
                f"{path} lacks mu and sigma, and {ARRAY}, images to compute them from; "
                f"it holds {', '.join(sorted(names)) or 'nothing'}"
            )
        return cls(**gaussians, features=features)

    def with_images(
        self, features: Mapping[str, Float[np.ndarray, "N _"]]
    ) -> "ReferenceStatistics":
        """Add the features of a file's images, and its distributions unless the file has them."""
        if self.pool is None:
            return ReferenceStatistics.of(features)
        return dataclasses.replace(self, features=features["pool"])

    def save(self, path: str | os.PathLike, extractor: str) -> None:
        """Write an `.npz` that `load` reads, whole or not at all.

        Args:
            path: the file.
            extractor: name of the features.
        """
        arrays = {EXTRACTOR: np.asarray(extractor)}
        for kind, names in GAUSSIANS.items():
            if (gaussian := getattr(self, kind)) is not None:
                arrays |= dict(zip(names, gaussian, strict=True))
        if self.features is not None:
            arrays[FEATURES] = self.features
        write_npz(path, arrays)


def has_images(path: str | os.PathLike) -> bool:
    """Tell whether a file that `ReferenceStatistics.load` has read holds images."""
    with storage.open_binary(path) as file, np.load(file) as arrays:
        return ARRAY in arrays


def _read_arrays(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], set[str]]:
    """Read everything but the images; return the arrays and the names of all that there are."""
    wanted = {EXTRACTOR, FEATURES, *(name for pair in GAUSSIANS.values() for name in pair)}
    try:
        with storage.open_binary(path) as file, np.load(file) as arrays:
            return {name: arrays[name] for name in wanted & set(arrays)}, set(arrays)
    except ARCHIVE_ERRORS as error:
        raise ValueError(
            f"{path} is not a readable .npz of reference statistics ({error})"
        ) from error


def _gaussian(
    path: str | os.PathLike,
    arrays: Mapping[str, np.ndarray],
    kind: str,
    extractor: Extractor,
) -> Gaussian | None:
    names = GAUSSIANS[kind]
    present = [name for name in names if name in arrays]
    if not present or kind not in extractor.dims:
        return None
    if len(present) < len(names):
        raise ValueError(f"{path} holds {present[0]} without the other of {' and '.join(names)}")
    dim = extractor.dims[kind]
    mean, covariance = (arrays[name] for name in names)
    if mean.shape != (dim,) or covariance.shape != (dim, dim):
        raise ValueError(
            f"{path} holds {names[0]} {mean.shape} and {names[1]} {covariance.shape}; the {kind} "
            f"features of {extractor.name} have {dim} numbers"
        )
    return Gaussian(mean.astype(np.float64), covariance.astype(np.float64))


def _features(
    path: str | os.PathLike, arrays: Mapping[str, np.ndarray], extractor: Extractor
) -> Float[np.ndarray, "N D"] | None:
    if FEATURES not in arrays:
        return None
    features, dim = arrays[FEATURES], extractor.dims["pool"]
    if features.ndim != 2 or features.shape[1] != dim:
        raise ValueError(
            f"{path} holds {FEATURES} {features.shape}; the pool features of {extractor.name} have "
            f"{dim} numbers"
        )
    return features.astype(np.float32)
