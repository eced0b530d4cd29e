"""Every preview of one set of samples against the reference, as lists that end with the image's."""

import dataclasses

from dar_jax.evaluation.evaluators.base import Evaluation, Metrics, Subject, below
from dar_jax.generation.image_sets import PREVIEW

LIST_SUFFIX = "_of_previews"
"""Ends the names of lists with a number per preview, the last one the image's."""


def evaluate(evaluation: Evaluation, subject: Subject) -> Metrics:
    """Judge the previews after each group of tokens, each quarter of the steps, or each pass."""
    images = evaluation.generated(subject, evaluation.sampling, previews=True)
    names = [name for name in images.pieces.names() if name.startswith(PREVIEW.format(""))]
    ordered = [PREVIEW.format(group + 1) for group in range(len(names))]
    after = [evaluation.judge(dataclasses.replace(images, name=name)) for name in ordered]
    metrics = [*after, evaluation.judge(images)]
    evaluation.show(images, subject)
    lists = {f"{name}{LIST_SUFFIX}": [each[name] for each in metrics] for name in metrics[0]}
    return below("generation", {**metrics[-1], **lists})
