"""Generated images beside the real ones that are most like them: what a model has by heart."""

import numpy as np
from scipy.spatial.distance import cdist

from dar_jax.common.image import labelled_grid
from dar_jax.common.typing import Float, Int, UInt8
from dar_jax.evaluation.image_sources import Images

ROWS = 10
COLUMNS = 6
"""Real images of a row."""


def nearest(
    features: Float[np.ndarray, "N D"], real: Float[np.ndarray, "M D"], count: int
) -> Int[np.ndarray, "N n"]:
    """Indices of the `count` real images, or all, whose features are nearest, the nearest first."""
    return np.argsort(cdist(features, real), axis=1, kind="stable")[:, :count]


def picture(
    images: Images,
    features: Float[np.ndarray, "N D"],
    real_images: Images,
    real: Float[np.ndarray, "M D"],
    names: list[str],
) -> UInt8[np.ndarray, "_ _ 3"]:
    """Draw a row per image: itself, and the real ones that are nearest.

    Args:
        images: some of them are shown, evenly spread.
        features: theirs, of a network.
        real_images: of the same size.
        real: their features.
        names: of the labels, which the images have in turns.
    """
    shown = np.unique(np.linspace(0, len(images) - 1, ROWS).round().astype(int)).tolist()
    found = nearest(features[shown], real, COLUMNS).tolist()
    cells = [images.read(i, i + 1) for i in shown]
    rows = [
        np.concatenate([cell, *(real_images.read(i, i + 1) for i in row)])
        for cell, row in zip(cells, found, strict=True)
    ]
    header = ["generated", *(f"real {number + 1}" for number in range(len(found[0])))]
    labels = [names[i % len(names)] for i in shown]
    return labelled_grid(np.concatenate(rows), labels, columns=len(header), header=header)
