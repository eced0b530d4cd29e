"""Generated images against the reference: FID, sFID, Inception score, KID, precision, recall."""

from dar_jax.evaluation.evaluators.base import Evaluation, Metrics, Subject, below


def evaluate(evaluation: Evaluation, subject: Subject) -> Metrics:
    """Judge one set of images."""
    previews = "previews" in evaluation.settings.names  # the set that they share
    images = evaluation.generated(subject, evaluation.sampling, previews=previews)
    metrics = evaluation.judge(images)
    evaluation.show(images, subject)
    return below("generation", metrics)
