"""Sets of reconstructions: what a tokenizer or an autoencoder makes of held-out images.

Every process works on its own devices and shares nothing but the directory, as in
`generation.image_sets`.
"""

import jax
import numpy as np

from dar_jax.common import image as images
from dar_jax.common.progress import Progress, wait_for
from dar_jax.common.typing import Array, Float
from dar_jax.evaluation.feature_store import read_ahead
from dar_jax.evaluation.image_sources import Images
from dar_jax.generation.batches import Autoencoder, SampleConfig, pad, whole_batch
from dar_jax.generation.image_set import PIXELS
from dar_jax.generation.image_sets import write_batch
from dar_jax.generation.resumable_arrays import Pieces
from dar_jax.models.dar.sampler import initial_noise
from dar_jax.models.kl_vae import posterior
from dar_jax.pipelines import KlVaePipeline, image_keys


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
        write_batch(pieces.save, progress, arrays, first, first + len(pixels))
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
