"""`--mode=evaluate`: a model directory to figures, judged by a classifier of the real images."""

import dataclasses
import json
import pathlib

import jax
import ml_collections
import numpy as np
from absl import logging

from dar_jax.common import image as images
from dar_jax.common.config import build
from dar_jax.data.sources import DataConfig, load_source
from dar_jax.data.transforms import center_crop
from dar_jax.evaluation.classifier import Classifier
from dar_jax.evaluation.reconstruction import psnr
from dar_jax.generation import SampleConfig, drawing, generate, load, pad, whole_batch
from dar_jax.models.dar.sampler import initial_noise
from dar_jax.pipelines import DarPipeline, image_keys


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """How much is generated: `num_images`, the same number of every class."""

    num_images: int = 1000

    def __post_init__(self):
        if self.num_images < 1:
            raise ValueError(f"num_images={self.num_images} must be at least 1")


def evaluate(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Print the figures of the model and write them to `WORKDIR/evaluation.json`.

    Raises:
        ValueError: the model or the data set cannot be read.
    """
    settings = build(EvaluateConfig, config.evaluate.to_dict(), "config.evaluate")
    data = build(DataConfig, config.data.to_dict(), "config.data")
    sampling, pipeline = load(config, workdir)
    train, test = (load_pixels(data, split) for split in ("train", "test"))

    logging.info("Fitting the classifier to %d real images", len(train[1]))
    classifier = Classifier(*train)
    figures = {
        "classifier/accuracy_on_real": classifier.accuracy(*test),
        **evaluate_reconstruction(pipeline, classifier, sampling, *test),
        **evaluate_generation(pipeline, classifier, settings, sampling),
        "num_generated": settings.num_images,
        **drawing(sampling, pipeline),
        "seed": sampling.seed,
    }
    path = pathlib.Path(workdir) / "evaluation.json"
    path.write_text(json.dumps(figures, indent=2) + "\n")
    width = max(map(len, figures))
    table = "\n".join(f"{name:{width}}  {_format(value)}" for name, value in figures.items())
    logging.info("Wrote %s:\n%s", path, table)


def load_pixels(data: DataConfig, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return all pixels [N, H, W, 3], centre-cropped, and labels [N] of a small source."""
    source = load_source(data, split)
    records = [source[i] for i in range(len(source))]
    pixels = np.stack([center_crop(r["pixels"], data.image_size) for r in records])
    return pixels, np.stack([r["label"] for r in records])


def evaluate_reconstruction(
    pipeline: DarPipeline,
    classifier: Classifier,
    sampling: SampleConfig,
    pixels: np.ndarray,
    labels: np.ndarray,
) -> dict[str, float]:
    """Held-out images through the tokenizer and back."""
    reconstruction, indices = reconstruct(pipeline, sampling, pixels)
    kept = classifier.predict(reconstruction) == classifier.predict(pixels)
    codebook_size = pipeline.tokenizer.config.codebook_size
    return {
        "reconstruction/label_kept": float(np.mean(kept)),
        "reconstruction/accuracy": classifier.accuracy(reconstruction, labels),
        "reconstruction/psnr_db": psnr(pixels, reconstruction),
        "reconstruction/codebook_usage": len(np.unique(indices)) / codebook_size,
    }


def reconstruct(
    pipeline: DarPipeline, sampling: SampleConfig, pixels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Encode and decode pixels [N, H, W, 3]; return them and the indices."""
    tokenizer, rng = pipeline.tokenizer, jax.random.key(sampling.seed)
    size = whole_batch(pipeline, min(sampling.batch_size, len(pixels)))
    reconstruction, indices = [], []
    for first in range(0, len(pixels), size):
        part = pixels[first : first + size]
        tokens = tokenizer.encode(pad(images.to_float(part), size))
        noise = initial_noise(image_keys(rng, size, first), part.shape[1:3])
        decoded = images.to_pixels(tokenizer.decode(tokens, noise=noise, solver=sampling.solver))
        reconstruction.append(np.asarray(decoded)[: len(part)])
        indices.append(np.asarray(tokens)[: len(part)])
    return np.concatenate(reconstruction), np.concatenate(indices)


def evaluate_generation(
    pipeline: DarPipeline, classifier: Classifier, settings: EvaluateConfig, sampling: SampleConfig
) -> dict[str, float | list[float]]:
    """Generated images, and their previews, against the class that they were asked for."""
    labels = np.arange(settings.num_images, dtype=np.int32) % pipeline.num_classes
    hits = [
        [classifier.predict(preview) == batch.labels for preview in batch.previews]
        for batch in generate(pipeline, labels, sampling)
    ]
    accuracies = np.concatenate(hits, axis=1).mean(axis=1).tolist()
    return {
        "generation/accuracy": accuracies[-1],
        "generation/accuracy_after_each_group": accuracies,
    }


def _format(value: float | list[float]) -> str:
    if isinstance(value, list):
        return " ".join(map(_format, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
