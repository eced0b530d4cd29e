"""The end of a run whose held-out loss no longer falls."""

import functools
import itertools
import math
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from dar_jax.common import storage
from dar_jax.common.typing import Array, Params, PRNGKeyArray
from dar_jax.parallel import distributed
from dar_jax.tasks.base import Task
from dar_jax.training import metrics
from dar_jax.training.config import TrainConfig

NAME = "eval/loss"
MAX_BATCHES = 16


def held_out_loss(
    task: Task,
    step: int,
    params: Params,
    batches: Iterable[Mapping[str, np.ndarray]],
    rng: PRNGKeyArray,
    frozen: Params,
) -> float:
    """Mean of the loss that is trained on, over the first `MAX_BATCHES`, with the same draws.

    Args:
        task: what the loss is.
        step: number of completed updates.
        params: averaged parameters.
        batches: of held-out pictures.
        rng: key; batch i draws from `fold_in(rng, i)`.
        frozen: of the task.
    """
    total = count = 0
    for index, batch in enumerate(itertools.islice(batches, MAX_BATCHES)):
        size, key = len(batch["label"]), jax.random.fold_in(rng, index)
        batch = {**batch, "step": np.int32(step)}
        total += size * float(_loss(task, params, batch, key, frozen))
        count += size
    return total / count


@functools.partial(jax.jit, static_argnames="task")
def _loss(
    task: Task, params: Params, batch: Mapping[str, Array], rng: PRNGKeyArray, frozen: Params
) -> Array:
    return task.loss(params, batch, rng, frozen)[0]


def has_ended(workdir: storage.Path, config: TrainConfig, step: int, since: int) -> bool:
    """Tell whether a run is over: at its last step, or because the held-out loss falls no more.

    That is when the last `config.patience` losses were not below all earlier ones, or not finite;
    what process 0 finds counts on all processes.

    Args:
        workdir: of the run.
        config: of training.
        step: number of completed updates.
        since: losses of fewer updates are sums of other terms, see `Task.complete_after`.
    """
    if step >= config.steps:
        return True
    if not config.patience or step % config.image_every:
        return False
    return distributed.of_first(lambda: _is_exhausted(workdir, config.patience, step, since))


def _is_exhausted(workdir: storage.Path, patience: int, step: int, since: int) -> bool:
    found = metrics.history(workdir / metrics.FILE_NAME, NAME, step)
    losses = [loss if math.isfinite(loss) else math.inf for at, loss in found if at >= since]
    return patience < len(losses) and min(losses[-patience:]) >= min(losses[:-patience])
