"""Held-out images through a tokenizer or VAE and back, against themselves.

Every process works on its own devices and shares nothing but the directory, as in
`generation.image_sets`.
"""

import jax
import numpy as np

from dar_jax.common import image as images
from dar_jax.common.batches import pad
from dar_jax.common.progress import Progress
from dar_jax.common.typing import Any
from dar_jax.evaluation.evaluators.base import Evaluation, Metrics, Subject, below
from dar_jax.evaluation.feature_store import read_rounds
from dar_jax.evaluation.image_sources import Images, SetImages, SplitImages, read_all
from dar_jax.evaluation.pairs import codebook_metrics, distance_metrics, pair_metrics
from dar_jax.evaluation.perceptual import psnr, ssim
from dar_jax.generation.batches import batch_size
from dar_jax.generation.image_set import PIXELS
from dar_jax.generation.image_sets import SOUND, write_batch
from dar_jax.generation.resumable_arrays import Pieces
from dar_jax.pipelines.base import Autoencoder, is_sound

INDICES = "indices"


def evaluate(evaluation: Evaluation, subject: Subject) -> Metrics:
    """Measure distortion, distances and the use of a codebook."""
    model, sampling = subject.autoencoder, evaluation.sampling
    originals = SplitImages(evaluation.data, "test", evaluation.settings.num_images)
    options = sampling.reconstruction(model.sampling)
    made_with = {
        "model": subject.fingerprint,
        "dtype": model.model.compute.dtype,
        "residual_dtype": model.model.compute.residual_jnp_dtype.name,
        "seed": sampling.seed,
        **(vars(options) if options else {}),
        "originals": originals.identity,
    }
    pieces = Pieces(evaluation.path("reconstructions", made_with), len(originals))
    pieces.bind(made_with)
    size = batch_size(sampling, model, len(originals))
    fill(pieces, model, originals, options, size=size, seed=sampling.seed)
    others = SetImages(pieces, made_with)
    measures = {"psnr_db": psnr, "ssim": ssim}
    if evaluation.lpips is not None:
        measures[f"lpips_{evaluation.settings.lpips}"] = evaluation.lpips
    metrics = pair_metrics(originals, others, measures, evaluation.directory)
    if model.codebook_size is not None:
        metrics |= codebook_metrics(pieces.array(INDICES), model.codebook_size)
    if evaluation.store is not None:
        metrics |= distance_metrics(evaluation.store, originals, others, evaluation.data)
    if evaluation.classifier is not None:
        classifier = evaluation.classifier
        pixels, original_pixels = read_all(others), read_all(originals)
        kept = classifier.predict(pixels) == classifier.predict(original_pixels)
        metrics["label_kept"] = float(np.mean(kept))
        metrics["accuracy"] = classifier.accuracy(pixels, originals.labels())
    return below("reconstruction", {**metrics, "num_images": len(others)})


def fill(
    pieces: Pieces,
    model: Autoencoder,
    originals: Images,
    options: Any,
    *,
    size: int,
    seed: int,
) -> None:
    """Encode and decode the originals that are lacking, together with whoever else is at it.

    Args:
        pieces: get the arrays `PIXELS`, 8-bit, and, of a tokenizer, `INDICES`.
        model: the tokenizer or VAE.
        originals: what is reconstructed.
        options: of the model's `sampling_class`.
        size: images at a time.
        seed: image i draws from `fold_in(seed, i)`.
    """
    rng = jax.random.key(seed)
    progress = Progress(int(pieces.missing().sum()))
    for first, pixels in read_rounds(originals, pieces, size):
        image = pad(images.to_float(pixels), size)
        made = model.reconstruct(image, rng=rng, first_index=first, sampling=options)
        arrays = {PIXELS: images.to_pixels(made.images)}
        if made.indices is not None:
            arrays[INDICES] = made.indices
        arrays[SOUND] = is_sound(made.images)
        write_batch(pieces.save, progress, arrays, first, first + len(pixels))
