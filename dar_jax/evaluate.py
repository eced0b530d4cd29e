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
from dar_jax.data.sources import DataConfig, Source, load_source
from dar_jax.evaluation.classifier import Classifier
from dar_jax.evaluation.reconstruction import psnr
from dar_jax.nn.compute import Compute
from dar_jax.pipelines import DarPipeline, TokenizerPipeline
from dar_jax.sample import SampleConfig, generate, load_dar


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
    sampling = build(SampleConfig, config.sample.to_dict(), "config.sample")
    data = build(DataConfig, config.data.to_dict(), "config.data")
    compute = build(Compute, config.compute.to_dict(), "config.compute")
    pipeline = load_dar(sampling, compute, workdir)
    train, test = (stack_source(load_source(data, split)) for split in ("train", "test"))

    logging.info("Fitting the classifier to %d real images", len(train[1]))
    classifier = Classifier(*train)
    figures = {
        "classifier/accuracy_on_real": classifier.accuracy(*test),
        **evaluate_reconstruction(pipeline.tokenizer, classifier, *test),
        **evaluate_generation(pipeline, classifier, settings, sampling),
        "num_generated": settings.num_images,
        "guidance_scale": sampling.guidance,
        "seed": sampling.seed,
    }
    path = pathlib.Path(workdir) / "evaluation.json"
    path.write_text(json.dumps(figures, indent=2) + "\n")
    width = max(map(len, figures))
    table = "\n".join(f"{name:{width}}  {_format(value)}" for name, value in figures.items())
    logging.info("Wrote %s:\n%s", path, table)


def stack_source(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Return all pixels [N, H, W, 3] and labels [N] of a small source."""
    records = [source[i] for i in range(len(source))]
    return np.stack([r["pixels"] for r in records]), np.stack([r["label"] for r in records])


def evaluate_reconstruction(
    tokenizer: TokenizerPipeline, classifier: Classifier, pixels: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """Held-out images through the tokenizer and back."""
    indices = tokenizer.encode(images.to_float(pixels))
    decoded = tokenizer.decode(indices, rng=jax.random.key(0))
    reconstruction = np.asarray(images.to_pixels(decoded))
    kept = classifier.predict(reconstruction) == classifier.predict(pixels)
    return {
        "reconstruction/label_kept": float(np.mean(kept)),
        "reconstruction/accuracy": classifier.accuracy(reconstruction, labels),
        "reconstruction/psnr_db": psnr(pixels, reconstruction),
        "reconstruction/codebook_usage": len(np.unique(indices)) / tokenizer.config.codebook_size,
    }


def evaluate_generation(
    pipeline: DarPipeline, classifier: Classifier, settings: EvaluateConfig, sampling: SampleConfig
) -> dict[str, float | list[float]]:
    """Generated images, and their previews, against the class that they were asked for."""
    labels = np.arange(settings.num_images, dtype=np.int32) % pipeline.prior.config.num_classes
    previews, _ = generate(pipeline, labels, sampling)
    accuracies = [classifier.accuracy(preview, labels) for preview in previews]
    return {
        "generation/accuracy": accuracies[-1],
        "generation/accuracy_after_each_group": accuracies,
    }


def _format(value: float | list[float]) -> str:
    if isinstance(value, list):
        return " ".join(map(_format, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
