"""Metrics of images against a reference of real ones, in the space of a network's features.

    fid                 Frechet distance of the pool features, `evaluation.frechet`
    sfid                of the spatial features
    inception_score     of the logits, in 10 parts in the images' order; of 10 images or more
    kid                 100 subsets of up to 1000 images
    precision, recall   3 neighbours

What a reference file cannot tell (`evaluation.reference`) is left out and said. Features of other
networks than Inception give no FID: `fd_vgg16`, `kd_vgg16`, `precision_vgg16` and `recall_vgg16`.

A Frechet distance grows as the number of images falls, so one of other features than Inception's
stands beside its floor, `fd_vgg16_floor`: the distance to the same reference of as many real images
of the other split of the data set ("test" where the reference is a file). Both are of the same
number of images, `fd_vgg16_images`: if that split has fewer, of so many of the first images only.
Where fewer images than features make the covariance rank-deficient, a warning says so, and the
floor.
"""

import functools
from typing import cast

import jax
import numpy as np
from absl import logging

from dar_jax.common import storage
from dar_jax.common.typing import Float, UInt8
from dar_jax.data.base import SPLITS, DataConfig
from dar_jax.evaluation import neighbours
from dar_jax.evaluation.feature_store import FeatureStore
from dar_jax.evaluation.features import INCEPTION, Extractor, metric_name
from dar_jax.evaluation.frechet import frechet_distance
from dar_jax.evaluation.image_sources import Images, SplitImages, check_size
from dar_jax.evaluation.inception_score import SPLITS as SPLITS_OF_SCORE
from dar_jax.evaluation.inception_score import inception_score
from dar_jax.evaluation.kid import SUBSET_SIZE, kid
from dar_jax.evaluation.moments import Gaussian, Moments
from dar_jax.evaluation.npz_images import NpzImages
from dar_jax.evaluation.precision_recall import precision_recall
from dar_jax.evaluation.reference import ReferenceStatistics, has_images

KID_SEED = 0


class Comparison:
    """Compares images with a reference."""

    def __init__(self, store: FeatureStore, reference: str, data: DataConfig, num_real: int):
        """Read the reference if it is a file; features of images are computed when needed.

        Args:
            store: makes and keeps the features.
            reference: "train" or "test", a split of the data set; or a `.npz`, see
                `evaluation.reference`.
            data: the data set.
            num_real: images of the split that are compared with, drawn at random.

        Raises:
            ValueError: the reference cannot be read, lacks what is needed or is of other features.
        """
        self._store = store
        self._extractor = store.extractor
        self._data = data
        self._split = reference if reference in SPLITS else None
        self._images, self._known = None, None
        if self._split:
            self._images = SplitImages(data, reference, num_real)
            len(self._images)  # opens the data set: a mistake in it comes before any work
            return
        path = storage.to_path(reference, "reference")
        if path.suffix != ".npz" or not path.is_file():
            raise ValueError(
                f"reference={reference!r} is not an .npz file, nor one of {', '.join(SPLITS)}"
            )
        self._known = ReferenceStatistics.load(path, store.extractor)
        if self._known.features is None and has_images(path):
            self._images = NpzImages(path)

    def metrics(self, images: Images) -> dict[str, float | int]:
        """Compute all that the reference permits; names as in the module.

        Raises:
            ValueError: the images are of another size than the reference's, or too few.
        """
        if self._images is not None:
            check_size(images, self._images)
        features = self._store.features(images)
        metrics = self._distances(images, features)
        if "logits" in features and len(features["logits"]) < SPLITS_OF_SCORE:
            logging.warning(
                "The Inception score needs %d images at least, there are %d: left out",
                SPLITS_OF_SCORE,
                len(features["logits"]),
            )
        elif "logits" in features:
            metrics["inception_score"] = inception_score(features["logits"])[0]
        pool, real = features["pool"], self._reference.features
        if real is not None:
            size = min(SUBSET_SIZE, len(pool), len(real))
            rng = np.random.default_rng(KID_SEED)
            values = {"kid": kid(pool, real, rng, subset_size=size)[0]}
            values["precision"], values["recall"] = precision_recall(real, pool)
            metrics |= {self._name(name): value for name, value in values.items()}
        return metrics

    def neighbours(self, images: Images, names: list[str]) -> UInt8[np.ndarray, "_ _ 3"] | None:
        """Draw images beside the real ones that are nearest, see `evaluation.neighbours`.

        None where the reference has no images.
        """
        real = self._reference.features
        if self._images is None or real is None:
            return None
        features = self._store.features(images)["pool"]
        return neighbours.picture(images, features, self._images, real, names)

    def _distances(self, images: Images, features: dict[str, np.ndarray]) -> dict[str, float | int]:
        pool, known = features["pool"], self._reference
        if self._extractor.name != INCEPTION:
            floor, count = self._floor(images.size, len(pool))
            warn_of_few(self._extractor, count, f"{floor:.4g}")
            name = self._name("fid")
            return {
                name: distance(pool[:count], self._pool),
                f"{name}_floor": floor,
                f"{name}_images": count,
            }
        if len(pool) < self._extractor.dims["pool"]:
            warn_of_few(self._extractor, len(pool), self._describe_floor(images.size, len(pool)))
        metrics = {"fid": distance(pool, self._pool)}
        if known.spatial is not None:
            metrics["sfid"] = distance(features["spatial"], known.spatial)
        return metrics

    @functools.cached_property
    def _reference(self) -> ReferenceStatistics:
        """Everything that is known of the reference, features of its images included."""
        known = self._known or ReferenceStatistics()
        if self._images is not None:
            known = known.with_images(self._store.features(self._images))
        if self._split and jax.process_index() == 0:
            name = self._extractor.identity
            known.save(self._store.directory / f"reference_{self._split}_{name}.npz", name)
        lacking = {
            "sfid": "spatial" in self._extractor.dims and known.spatial is None,
            "kid, precision and recall": known.features is None,
        }
        for metrics, is_lacking in lacking.items():
            if is_lacking:
                logging.warning("The reference file lacks what %s need: left out", metrics)
        return known

    @property
    def _pool(self) -> Gaussian:
        # A reference whose file does not have it has images to compute it from.
        return cast(Gaussian, self._reference.pool)

    @functools.cache  # noqa: B019 - there are one or two of this class
    def _floor(self, size: tuple[int, int], count: int) -> tuple[float, int]:
        """Distance of `count` other real images, or fewer, to the reference; and their number."""
        (other,) = set(SPLITS) - {self._split or "train"}
        images = SplitImages(self._data, other, count)
        if images.size != size:
            raise ValueError(
                f"the floor of {self._name('fid')} needs real images of the same size: set "
                f"config.data.image_size={self._data.image_size} to {size[0]}"
            )
        pool = self._store.features(images)["pool"]
        return distance(pool, self._pool), len(pool)

    def _describe_floor(self, size: tuple[int, int], count: int) -> str:
        """Inception's features want no floor but for a warning: not having one is no mistake."""
        try:
            floor, found = self._floor(size, count)
        except ValueError as error:
            return f"unknown ({error})"
        return f"{floor:.4g} ({found} images)"

    def _name(self, metric: str) -> str:
        return metric_name(metric, self._extractor.name)


def distance(features: Float[np.ndarray, "N D"], real: Gaussian) -> float:
    """Frechet distance of feature vectors to a distribution."""
    return frechet_distance(Moments.of(features).gaussian(), real)


def warn_of_few(extractor: Extractor, count: int, floor: str) -> None:
    """Warn if there are fewer images than features.

    Args:
        extractor: of the features.
        count: number of images.
        floor: distance of as many real images, or why it is not known.
    """
    dim = extractor.dims["pool"]
    if count < dim:
        logging.warning(
            "%s of %d images in %d features: the covariance is rank-deficient and the distance too "
            "large; its floor, the distance of as many real images, is %s",
            metric_name("fid", extractor.name),
            count,
            dim,
            floor,
        )
