"""Sets of images that a model makes: generated ones, with their previews, and reconstructions.

Every process works on its own devices and shares nothing but the directory. A run that was killed
goes on where it stopped; image i depends on the seed, i and its label or original only.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np

from dar_jax.common import image as images
from dar_jax.common.progress import Progress, wait_for
from dar_jax.common.typing import Array, Float
from dar_jax.evaluation.feature_store import read_ahead
from dar_jax.evaluation.image_set import PIXELS, ImageSet
from dar_jax.evaluation.image_sources import Images
from dar_jax.evaluation.pieces import Pieces
from dar_jax.generation import Autoencoder, SampleConfig, options, pad, whole_batch
from dar_jax.models.dar.sampler import initial_noise
from dar_jax.models.kl_vae import posterior
from dar_jax.pipelines import KlVaePipeline, Pipeline, image_keys

PREVIEW = "after_{}"
"""Name of the array of first, second, ... previews; the last ones, the images, are `PIXELS`."""


def fill(
    image_set: ImageSet, pipeline: Pipeline, config: SampleConfig, *, previews: bool = False
) -> None:
    """Generate the images that the set lacks, then wait until other processes have made theirs.

    Args:
        image_set: bound to what the images depend on.
        pipeline: the model.
        config: how they are drawn.
        previews: keep the previews as well, see `PREVIEW`.
    """

    def generate(first: int, stop: int, size: int) -> dict[str, Array]:
        labels = pad(image_set.labels_of(first, stop), size)
        how = options(config, pipeline, first)
        stream = pipeline.stream(labels, **how) if previews else [pipeline.generate(labels, **how)]
        kept = {}
        for number, last in enumerate(stream, 1):
            kept[PREVIEW.format(number)] = images.to_pixels(last.images)
        kept[PIXELS] = kept.pop(PREVIEW.format(number))
        return {**kept, **{name: getattr(last, name) for name in pipeline.kept_fields}}

    def write(first: int, arrays: dict[str, np.ndarray]) -> None:
        image_set.write(first, arrays.pop(PIXELS), arrays)

    size = whole_batch(pipeline, min(config.batch_size, image_set.count))
    runs = list(image_set.runs(size, jax.process_index(), jax.process_count()))
    progress = Progress(sum(stop - first for first, stop in runs))
    finish = None
    for first, stop in runs:
        arrays = generate(first, stop, size)
        # Write one batch while the devices are at the next.
        if finish is not None:
            finish()
        finish = functools.partial(_write, write, progress, arrays, first, stop)
    if finish is not None:
        finish()
    wait_for(lambda: not image_set.missing().any(), "the images of other processes")


def fill_reconstructions(
    pieces: Pieces, model: Autoencoder, originals: Images, config: SampleConfig
) -> None:
    """Encode and decode the originals that the set lacks; wait for other processes as `fill` does.

    Args:
        pieces: get the arrays `PIXELS` and, of a tokenizer, `indices`.
        model: the tokenizer or VAE.
        originals: what is reconstructed.
        config: batch size, seed and solver.
    """
    size = whole_batch(model, min(config.batch_size, len(originals)))
    runs = list(pieces.runs(size, jax.process_index(), jax.process_count()))
    progress = Progress(sum(stop - first for first, stop in runs))
    for first, pixels in read_ahead(originals, runs):
        arrays = reconstruct(model, pad(images.to_float(pixels), size), first, config)
        _write(pieces.save, progress, arrays, first, first + len(pixels))
    wait_for(lambda: not pieces.missing().any(), "the images of other processes")


def reconstruct(
    model: Autoencoder, image: Float[np.ndarray, "B H W 3"], first: int, config: SampleConfig
) -> dict[str, Array]:
    """Encode and decode a batch: 8-bit images, and a tokenizer's indices.

    A tokenizer decodes image i from the noise of `fold_in(seed, i)`; a VAE the posterior's mean.

    Args:
        model: the tokenizer or VAE.
        image: in [-1, 1].
        first: index of the first image.
        config: seed and solver.
    """
    if isinstance(model, KlVaePipeline):
        latents = posterior(model.encode(image)).mean
        return {PIXELS: images.to_pixels(model.decode(latents))}
    indices = model.encode(image)
    rngs = image_keys(jax.random.key(config.seed), len(image), first)
    noise = initial_noise(rngs, image.shape[1:3])
    decoded = model.decode(indices, noise=noise, solver=config.solver)
    return {PIXELS: images.to_pixels(decoded), "indices": indices}


def _write(
    write: Callable[[int, dict[str, np.ndarray]], None],
    progress: Progress,
    arrays: dict[str, Array],
    first: int,
    stop: int,
) -> None:
    """Fetch what the batch holds, without padding, and write it."""
    write(first, {name: np.asarray(array)[: stop - first] for name, array in arrays.items()})
    progress.add(stop - first)
