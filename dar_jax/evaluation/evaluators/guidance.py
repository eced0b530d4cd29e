"""Generated images against the reference at every one of several guidance scales."""

from absl import logging

from dar_jax.evaluation.evaluators.base import Evaluation, Metrics, Subject, below


def evaluate(evaluation: Evaluation, subject: Subject) -> Metrics:
    """Judge one set of images per scale, as lists."""
    scales, metrics = evaluation.settings.guidance_scales, []
    previews = "previews" in evaluation.settings.names
    own = evaluation.sampling.options.get("guidance_scale")
    for scale in scales:
        logging.info("Guidance %s", scale)
        # The scale of the config shares its set of images with the other evaluators.
        shared = previews and scale == own
        images = evaluation.generated(subject, evaluation.with_scale(scale), previews=shared)
        metrics.append(evaluation.judge(images))
    lists = {name: [each[name] for each in metrics] for name in metrics[0]}
    return below("guidance", {"scales": list(scales), **lists})
