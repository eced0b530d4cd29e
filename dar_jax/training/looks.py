"""What is looked at while a model is trained, and what of it a run has missed that was stopped.

The state of a step is saved before anything is made of it, so that no look can cost it. A run that
ends between the two makes up for it when it goes on.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax

from dar_jax.common import model_dir, storage
from dar_jax.common.files import parse_json, read_regular
from dar_jax.common.typing import Params
from dar_jax.data import pipeline
from dar_jax.data.base import DataConfig
from dar_jax.parallel import distributed, sharding
from dar_jax.tasks.base import Task
from dar_jax.training import metrics, patience
from dar_jax.training.config import TrainConfig
from dar_jax.training.report import is_due
from dar_jax.training.state import TrainState

NUM_PICTURES = 16
"""Held-out pictures given to `task.pictures`."""


@dataclasses.dataclass(frozen=True)
class Look:
    """Writes the task's pictures and metrics of the first held-out images, drawn the same way.

    Attributes:
        task: what is trained.
        data: of the held-out images.
        mesh: of all processes; all is replicated, so that the task can read its results on each.
        seed: of what is drawn.
        with_loss: measure the held-out loss as well.
        class_names: of the data.
    """

    task: Task
    data: DataConfig
    mesh: jax.sharding.Mesh
    seed: int
    with_loss: bool
    class_names: Sequence[str]

    def __call__(
        self, state: TrainState, frozen: Params, step: int, *, writer: metrics.Writer
    ) -> None:
        """Look at the averaged parameters; the line of figures is written last."""
        batch = next(pipeline.eval_batches(self.data, "test", NUM_PICTURES))
        params, batch, frozen = jax.device_put(
            (state.eval_params, batch, frozen), sharding.replicated(self.mesh)
        )
        inputs = (params, batch, jax.random.key(self.seed), frozen)
        panels = self.task.pictures(*inputs)
        writer.pictures(step, {n: panel.draw(self.class_names) for n, panel in panels.items()})
        values = self.task.held_out_metrics(*inputs)
        if self.with_loss:
            batches = pipeline.eval_batches(self.data, "test")
            values["loss"] = patience.held_out_loss(self.task, step, params, batches, *inputs[2:])
        if values:
            writer.scalars(step, {f"eval/{name}": value for name, value in values.items()})


class Missed(NamedTuple):
    """What is due at the step that a run goes on from, and is not there."""

    look: bool = False
    evaluation: bool = False


def find_missed(workdir: storage.Path, config: TrainConfig, step: int) -> Missed:
    """Look for traces of what was due at a step; what process 0 finds counts on all processes.

    A look whose task has no figures leaves none, and is repeated unless the run was at its end.
    """
    if not step:
        return Missed()
    path = workdir / metrics.FILE_NAME
    names, exported = distributed.of_first(
        lambda: (sorted(metrics.names_at(path, step)), _exported_step(workdir))
    )
    parts = [len(name.split("/")) for name in names if name.startswith("eval/")]
    looked = 2 in parts or (step == config.steps and exported == step)
    evaluated = any(count > 2 for count in parts)  # they name the evaluator
    return Missed(
        look=is_due(step, config.image_every, config.steps) and not looked,
        evaluation=is_due(step, config.evaluate_every, config.steps) and not evaluated,
    )


def _exported_step(workdir: storage.Path) -> int | None:
    """Step of the model that a run wrote at its end."""
    path = workdir / model_dir.WORKDIR_NAME / model_dir.CONFIG_NAME
    try:
        return parse_json(read_regular(path, model_dir.MAX_CONFIG_BYTES))["step"]
    except (OSError, ValueError, TypeError, LookupError):
        return None
