"""Metrics of reconstructions beside their originals: distortion, similarity, use of codes."""

from collections.abc import Callable, Mapping

import numpy as np
from scipy.stats import entropy

from dar_jax.common import storage
from dar_jax.common.typing import Int, UInt8
from dar_jax.data.base import DataConfig
from dar_jax.evaluation.distances import distance, warn_of_few
from dar_jax.evaluation.feature_store import PIECE, FeatureStore, digest, read_rounds
from dar_jax.evaluation.features import metric_name
from dar_jax.evaluation.image_sources import Images, SplitImages
from dar_jax.evaluation.moments import Moments
from dar_jax.generation.resumable_arrays import Pieces

Metric = Callable[[UInt8[np.ndarray, "N H W 3"], UInt8[np.ndarray, "N H W 3"]], float]
"""Mean over pairs of an original and another image."""


def pair_metrics(
    originals: Images, others: Images, metrics: Mapping[str, Metric], directory: storage.Path
) -> dict[str, float]:
    """Compute means over all pairs; a killed run goes on, and processes share the work.

    Args:
        originals: the originals.
        others: as many, of the same size.
        metrics: by name.
        directory: for what is computed.

    Raises:
        ValueError: an image cannot be read, or is too small for a metric.
    """
    settings = {
        "originals": originals.identity,
        "others": others.identity,
        "metrics": sorted(metrics),
    }
    pieces = Pieces(directory / f"pairs-{digest(settings)}", len(others))
    pieces.bind(settings)
    for first, pixels in read_rounds(others, pieces, PIECE):
        same = originals.read(first, first + len(pixels))
        means = {name: metric(same, pixels) for name, metric in metrics.items()}
        # The mean of the piece in each of its rows: the mean of all rows is that of all pairs.
        pieces.save(first, {name: np.full(len(pixels), mean) for name, mean in means.items()})
    return {name: float(np.mean(pieces.array(name))) for name in metrics}


def codebook_metrics(indices: Int[np.ndarray, "B N"], codebook_size: int) -> dict[str, float]:
    """Share of the codes that occur, and the exponential of the entropy of their frequencies."""
    counts = np.bincount(indices.reshape(-1), minlength=codebook_size)
    return {
        "codebook_usage": float(np.mean(counts > 0)),
        "codebook_perplexity": float(np.exp(entropy(counts))),
    }


def distance_metrics(
    store: FeatureStore, originals: Images, others: Images, data: DataConfig
) -> dict[str, float]:
    """Frechet distance between reconstructions and their originals: rFID.

    Other features than Inception's give `fd_vgg16`, and `fd_vgg16_floor`: the distance of the
    originals to as many images that were trained on, or to all if there are fewer.

    Raises:
        ValueError: an image cannot be read.
    """
    real, made = (store.features(images)["pool"] for images in (originals, others))
    name = metric_name("fid", store.extractor.name)
    metrics = {name: distance(made, Moments.of(real).gaussian())}
    if name == "fid":
        warn_of_few(store.extractor, len(real), "0 for the originals themselves")
        return metrics
    trained_on = store.features(SplitImages(data, "train", len(real)))["pool"]
    floor = distance(real, Moments.of(trained_on).gaussian())
    warn_of_few(store.extractor, len(real), f"{floor:.4g}")
    return {**metrics, f"{name}_floor": floor}
