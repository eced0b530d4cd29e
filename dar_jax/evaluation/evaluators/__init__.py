"""What models are judged by, by name; see `evaluation.config`."""

from collections.abc import Callable

import numpy as np

from dar_jax.evaluation.classifier import balanced_accuracy
from dar_jax.evaluation.evaluators import (
    generation,
    guidance,
    likelihood,
    previews,
    reconstruction,
)
from dar_jax.evaluation.evaluators.base import Evaluation, Metrics, Subject
from dar_jax.evaluation.image_sources import SplitImages, read_all

EVALUATORS: dict[str, Callable[[Evaluation, Subject], Metrics]] = {
    "reconstruction": reconstruction.evaluate,
    "generation": generation.evaluate,
    "previews": previews.evaluate,
    "guidance": guidance.evaluate,
    "likelihood": likelihood.evaluate,
}


def evaluate_model(evaluation: Evaluation, subject: Subject) -> Metrics:
    """Run all evaluators that the config names.

    Raises:
        ValueError: data cannot be read, or are of another size than what the model makes.
    """
    metrics = {}
    if evaluation.classifier is not None:
        test = SplitImages(evaluation.data, "test")
        labels, named = test.labels(), evaluation.classifier.predict(read_all(test))
        metrics["classifier/accuracy_on_real"] = float(np.mean(named == labels))
        metrics["classifier/balanced_accuracy_on_real"] = balanced_accuracy(named, labels)
    for name in evaluation.settings.names:
        metrics |= EVALUATORS[name](evaluation, subject)
    return metrics
