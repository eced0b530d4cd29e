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
import zipfile
from collections.abc import Iterable, Mapping

import numpy as np

from dar_jax.common.files import replacing
from dar_jax.common.typing import Float, UInt8
from dar_jax.evaluation.features import FeatureExtractor
from dar_jax.evaluation.moments import Gaussian, Moments
from dar_jax.evaluation.npz_images import ARRAY, NpzImages

READ_BATCH = 256
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
    def of(
        cls, batches: Iterable[UInt8[np.ndarray, "n H W 3"]], extractor: FeatureExtractor
    ) -> "ReferenceStatistics":
        """Compute all from real images.

        Raises:
            ValueError: there are fewer than two, or they are not uint8 [n, H, W, 3].
        """
        moments, pool = {}, []
        for pixels in batches:
            features = extractor.features(pixels)
            pool.append(features["pool"])
            for kind in GAUSSIANS.keys() & features.keys():
                new = Moments.of(features[kind])
                moments[kind] = moments[kind] + new if kind in moments else new
        if not pool:
            raise ValueError("there are no real images to compare to")
        gaussians = {kind: part.gaussian() for kind, part in moments.items()}
        return cls(**gaussians, features=np.concatenate(pool))

    @classmethod
    def load(
        cls, path: str | os.PathLike, extractor: FeatureExtractor, *, need_features: bool
    ) -> "ReferenceStatistics":
        """Read a file, see the module; what only its images can tell is computed.

        Args:
            path: an `.npz`.
            extractor: makes features of its images.
            need_features: whether features of single images are needed, as for precision, recall
                and KID; computing them takes a while.

        Raises:
            ValueError: the file is unreadable, lacks what is needed, or holds other features.
        """
        arrays = _read_arrays(path)
        found = str(arrays.get(EXTRACTOR, extractor.name))
        if found != extractor.name:
            raise ValueError(f"{path} holds features of {found}, expected {extractor.name}")
        known = cls(
            **{kind: _gaussian(path, arrays, kind, extractor) for kind in GAUSSIANS},
            features=_features(path, arrays, extractor),
        )
        wanted = {"pool": known.pool} | ({"features": known.features} if need_features else {})
        if all(part is not None for part in wanted.values()):
            return known
        if not _has_images(path):
            lacking = "mu and sigma" if known.pool is None else FEATURES
            raise ValueError(f"{path} lacks {lacking}, and {ARRAY}, images to compute them from")
        computed = cls.of(NpzImages(path).batches(READ_BATCH), extractor)
        if known.pool is None:
            return computed
        return dataclasses.replace(known, features=computed.features)

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
        with replacing(path) as temporary:
            np.savez(temporary, **arrays)


def _read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read everything but the images."""
    names = {EXTRACTOR, FEATURES, *(name for pair in GAUSSIANS.values() for name in pair)}
    try:
        with np.load(path) as arrays:
            return {name: arrays[name] for name in names & set(arrays)}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no readable .npz of reference statistics ({error})") from error


def _has_images(path: str | os.PathLike) -> bool:
    with np.load(path) as arrays:
        return ARRAY in arrays


def _gaussian(
    path: str | os.PathLike,
    arrays: Mapping[str, np.ndarray],
    kind: str,
    extractor: FeatureExtractor,
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
    path: str | os.PathLike, arrays: Mapping[str, np.ndarray], extractor: FeatureExtractor
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
