"""Sets of images that a model makes: generated ones, with their previews.

Every process works on its own devices and shares nothing but the directory, of a job or started by
itself, from the beginning or later. A run that was killed goes on where it stopped, and what a lost
process had begun the others make; image i depends on the seed, i and its label only.
"""

import contextlib
from collections.abc import Callable

import numpy as np

from dar_jax.common import image as images
from dar_jax.common.batches import pad, side_by_side
from dar_jax.common.progress import Progress
from dar_jax.common.typing import Any, Array
from dar_jax.generation.batches import batch_size, options
from dar_jax.generation.config import SampleConfig
from dar_jax.generation.image_set import PIXELS, ImageSet
from dar_jax.pipelines.base import Pipeline, check_sound, is_sound

PREVIEW = "after_{}"
"""Name of the array of first, second, ... previews; the last ones, the images, are `PIXELS`."""
SOUND = "sound"
"""Name of the array that tells of which images all is finite; it is not written."""


def fill(
    image_set: ImageSet, pipeline: Pipeline, config: SampleConfig, *, previews: bool = False
) -> None:
    """Generate the images that the set lacks, together with whoever else is at it.

    Args:
        image_set: bound to what the images depend on.
        pipeline: the model.
        config: how they are drawn.
        previews: keep the previews as well, see `PREVIEW`.

    Raises:
        ValueError: what the model draws is not finite.
    """

    def generate(run: tuple[int, int]) -> tuple[dict[str, Array], int, int]:
        first, stop = run
        labels = pad(image_set.labels_of(first, stop), size)
        how = options(config, pipeline, first)
        kept: dict[str, Array] = {}
        last: Any = None
        for number, last in enumerate(pipeline.stream(labels, previews=previews, **how), 1):
            kept[PREVIEW.format(number)] = images.to_pixels(last.images)
        kept[PIXELS] = kept.popitem()[1]
        others = {name: getattr(last, name) for name in pipeline.kept_fields}
        sound = is_sound(last.images, *others.values())
        return {**kept, **others, SOUND: sound}, first, stop

    size = batch_size(config, pipeline, image_set.count)
    progress = Progress(int(image_set.missing().sum()))
    with contextlib.closing(image_set.rounds(size)) as rounds:
        for runs in rounds:
            # Written while the devices are at the next.
            batches = side_by_side(generate, lambda made: fetch(*made), runs, pipeline.mesh)
            with contextlib.closing(batches):
                for first, rows in batches:
                    pixels = rows.pop(PIXELS)
                    image_set.write(first, pixels, rows)
                    progress.add(len(pixels))


def write_batch(
    write: Callable[[int, dict[str, np.ndarray]], None],
    progress: Progress,
    arrays: dict[str, Array],
    first: int,
    stop: int,
) -> None:
    """Fetch a batch and write it, see `fetch`."""
    write(*fetch(arrays, first, stop))
    progress.add(stop - first)


def fetch(arrays: dict[str, Array], first: int, stop: int) -> tuple[int, dict[str, np.ndarray]]:
    """Wait for the images `first` .. `stop - 1`; return `first` and what they hold, unpadded.

    Raises:
        ValueError: the images are not finite, by the array `SOUND`.
    """
    rows = {name: np.asarray(array)[: stop - first] for name, array in arrays.items()}
    check_sound(rows.pop(SOUND), first)
    return first, rows
