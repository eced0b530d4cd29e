"""How likely held-out images are to a model of codes, and the classes that follow by Bayes' rule.

Every process works on its own devices and shares nothing but the directory, as in
`evaluators.reconstruction`.
"""

from typing import Any

import jax
import numpy as np
from PIL import Image

from dar_jax.common import image as images
from dar_jax.common.batches import pad
from dar_jax.common.files import replacing
from dar_jax.common.progress import Progress
from dar_jax.common.typing import Float, Int
from dar_jax.evaluation.evaluators.base import Evaluation, Metrics, Subject, below
from dar_jax.evaluation.feature_store import read_rounds
from dar_jax.evaluation.image_sources import SplitImages
from dar_jax.generation.batches import batch_size, class_name
from dar_jax.generation.image_sets import SOUND, write_batch
from dar_jax.generation.resumable_arrays import Pieces
from dar_jax.generation.surprise import picture
from dar_jax.models.dar.likelihood import LogLikelihood
from dar_jax.models.dar.sampler import group_boundaries
from dar_jax.pipelines.base import is_sound

CALIBRATION = "calibration_"
"""Begins the names of the lists that make the calibration plot."""
NUM_BINS = 10
ROWS = 5
"""Images of the greatest and of the least surprise that are shown."""


def evaluate(evaluation: Evaluation, subject: Subject) -> Metrics:
    """Score held-out images and as many training images; draw `surprise.png`."""
    test, found = _scores(evaluation, subject, "test", evaluation.settings.num_images)
    _, known = _scores(evaluation, subject, "train", len(test))
    size = subject.generator.image_size**2
    scored, reference = (LogLikelihood(each["tokens"], size) for each in (found, known))
    bounds = group_boundaries(subject.autoencoder.config)
    groups = np.split(-scored.tokens, bounds[:-1], axis=1)
    if jax.process_index() == 0:
        _draw(evaluation, subject, test, found)
    metrics = {
        "nats_per_image": float(-scored.images.mean()),
        "nats_per_image_on_train": float(-reference.images.mean()),
        "bits_per_pixel": float(scored.bits_per_pixel.mean()),
        "nats_of_groups": [float(group.sum(axis=1).mean()) for group in groups],
        "deviation_from_train": float(scored.deviation_from(reference).mean()),
        "num_images": len(test),
        **calibration(found["classes"], found["labels"]),
    }
    return below("likelihood", metrics)


def calibration(scores: Float[np.ndarray, "N classes"], labels: Int[np.ndarray, " N"]) -> Metrics:
    """Judge the class of greatest posterior, and whether its posterior says how often it is right.

    Args:
        scores: log-likelihood under every class.
        labels: the right classes.

    Returns:
        `accuracy`; of bins of as many images each, by their confidence, the lists
        `calibration_confidence` and `calibration_accuracy`, means; `calibration_error`, the mean
        distance of the two.
    """
    confidence = np.exp(scores.max(axis=1) - np.logaddexp.reduce(scores, axis=1))
    right = scores.argmax(axis=1) == labels
    bins = np.array_split(np.argsort(confidence, kind="stable"), min(NUM_BINS, len(labels)))
    sure, found = ([float(values[part].mean()) for part in bins] for values in (confidence, right))
    gaps = np.abs(np.subtract(sure, found))
    return {
        "accuracy": float(right.mean()),
        "calibration_error": float(np.average(gaps, weights=[len(part) for part in bins])),
        f"{CALIBRATION}confidence": sure,
        f"{CALIBRATION}accuracy": found,
    }


def _scores(
    evaluation: Evaluation, subject: Subject, split: str, count: int
) -> tuple[SplitImages, dict[str, np.ndarray]]:
    """Score so many images of a split, as are not scored yet; under all classes if held out.

    Returns the images and, for each, `labels`, `indices` [N], the log-probabilities `tokens` [N],
    and of held-out images also `classes`.
    """
    model: Any = subject.generator  # has a likelihood, as `Evaluation.load` has seen
    pictures = SplitImages(evaluation.data, split, count)
    made_with = {
        "model": subject.fingerprint,
        "dtype": model.compute.dtype,
        "residual_dtype": model.compute.residual_jnp_dtype.name,
        "images": pictures.identity,
    }
    pieces = Pieces(evaluation.path("likelihood", made_with), len(pictures))
    pieces.bind(made_with)
    size = batch_size(evaluation.sampling, model, len(pictures))
    labels = pictures.labels().astype(np.int32)
    progress = Progress(int(pieces.missing().sum()))
    for first, pixels in read_rounds(pictures, pieces, size):
        stop = first + len(pixels)
        own = pad(labels[first:stop], size)
        indices = model.autoencoder.encode(pad(images.to_float(pixels), size))
        tokens = model.log_likelihood(indices, own).tokens
        arrays = {"indices": indices, "tokens": tokens}
        if split == "test":
            arrays["classes"] = model.class_log_likelihoods(indices)
        arrays[SOUND] = is_sound(*arrays.values())
        write_batch(pieces.save, progress, arrays, first, stop)
    return pictures, {"labels": labels, **{name: pieces.array(name) for name in pieces.names()}}


def _draw(
    evaluation: Evaluation, subject: Subject, test: SplitImages, found: dict[str, np.ndarray]
) -> None:
    """Draw the likeliest and the least likely images."""
    nats = -found["tokens"]
    ranked = np.argsort(nats.sum(axis=1), kind="stable")
    shown = ranked if len(ranked) < 2 * ROWS else np.concatenate([ranked[:ROWS], ranked[-ROWS:]])
    pixels = np.concatenate([test.read(i, i + 1) for i in map(int, shown)])
    names = [
        f"{class_name(subject.generator, label)}: {total:.0f} nats"
        for label, total in zip(
            found["labels"][shown].tolist(), nats[shown].sum(axis=1), strict=True
        )
    ]
    tokenizer: Any = subject.autoencoder
    drawn = picture(tokenizer, pixels, found["indices"][shown], nats[shown], names)
    with replacing(evaluation.directory / "surprise.png") as temporary:
        Image.fromarray(drawn).save(temporary)
