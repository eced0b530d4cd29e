"""`--mode=evaluate`: a model directory, or images, to metrics, by one exact protocol.

    generation      images i = 0 .. n-1 with labels i mod classes and keys fold_in(seed, i), to 8
                    bits as trunc(clip(127.5 x + 128, 0, 255)); against a reference file, or against
                    ADM centre crops of the data set
    reconstruction  the held-out split, as the same centre crops in 8 bits that enter the model,
                    against its reconstructions, 8-bit like samples; with the model's own solver and
                    steps, image i drawing its noise from fold_in(seed, i)
    likelihood      the same crops, encoded; of D-AR only: the codes of a label are scored exactly,
                    those of the other classes too, for a posterior of equally likely classes

See `evaluation.config.EvaluateConfig` for what is measured, `evaluation.distances` for the
distances, `evaluation.image_sources` for rounding, `evaluation.features` for the networks.
Published figures (ImageNet 256 x 256) are of n = 50,000 images against the ADM suite's
`VIRTUAL_imagenet256_labeled`:

    --config.evaluate.reference=VIRTUAL_imagenet256_labeled.npz --config.evaluate.weights=DIR

The reference implementation draws labels at random instead of in turns, and so does not have the
same number of images of every class.
"""

from absl import logging

from dar_jax.common import storage
from dar_jax.common.files import write_json
from dar_jax.common.typing import Any
from dar_jax.common.version import revision, version
from dar_jax.config import Config
from dar_jax.data import survey
from dar_jax.evaluation import report
from dar_jax.evaluation.evaluators import evaluate_model
from dar_jax.evaluation.evaluators.base import DIRECTORY_NAME, Evaluation
from dar_jax.evaluation.evaluators.likelihood import CALIBRATION
from dar_jax.evaluation.evaluators.previews import LIST_SUFFIX
from dar_jax.generation.batches import model_path
from dar_jax.parallel import distributed
from dar_jax.parallel.workdir import open_workdir

RESULT_NAME = "evaluation.json"
HELD_OUT = ("reconstruction/num_images", "likelihood/num_images")
"""Numbers of held-out images."""


def evaluate(config: Config, workdir: str) -> None:
    """Print the metrics that the config asks for and write them to `WORKDIR/evaluation.json`.

    Curves over previews, guidance or confidence are drawn to
    `WORKDIR/evaluation/{previews,guidance,calibration}.png`, and images beside the real ones that
    are nearest to `neighbours.png`.

    Raises:
        ValueError: model, images, data, weights or reference cannot be had or do not fit.
    """
    evaluation = Evaluation(config, workdir)
    images = evaluation.settings.images
    subject = None if images else evaluation.load(model_path(evaluation.sampling, workdir))
    directory = open_workdir(workdir)
    if subject is None:
        results = {**evaluation.of_images(), "images": images}
    else:
        results = {**evaluate_model(evaluation, subject), **evaluation.made_with(subject)}
        held_out = [count for name, count in results.items() if name in HELD_OUT]
        survey.warn_of_few(min(held_out, default=survey.FEW_PICTURES))
    results |= {"version": version(), "revision": revision()}
    distributed.of_first(lambda: _write(directory, results))


def _write(directory: storage.Path, results: dict[str, Any]) -> None:
    write_json(directory / RESULT_NAME, results)
    logging.info("Wrote %s:\n%s", directory / RESULT_NAME, report.table(results))
    draw(directory / DIRECTORY_NAME, results)


def draw(directory: storage.Path, results: dict[str, Any]) -> None:
    """Draw what is varied."""
    previews = {
        name.removeprefix("generation/").removesuffix(LIST_SUFFIX): values
        for name, values in results.items()
        if name.endswith(LIST_SUFFIX)
    }
    guidance = {
        name.removeprefix("guidance/"): values
        for name, values in results.items()
        if name.startswith("guidance/")
    }
    confidence, accuracy = (
        results.get(f"likelihood/{CALIBRATION}{name}") for name in ("confidence", "accuracy")
    )
    if confidence and accuracy:
        report.draw_calibration(directory / "calibration.png", confidence, accuracy)
    if previews:
        ticks = [str(i + 1) for i in range(len(next(iter(previews.values()))))]
        report.draw_curves(directory / "previews.png", ticks, "preview", previews)
    if guidance:
        ticks = [*map(report.format_value, guidance.pop("scales"))]
        report.draw_curves(directory / "guidance.png", ticks, "guidance scale", guidance)
