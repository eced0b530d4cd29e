"""Evaluation of a model that is being trained: `--mode=evaluate` every so many steps."""

import contextlib
import dataclasses
from collections.abc import Callable

import jax

from dar_jax.common import model_dir, storage
from dar_jax.common.model_dir import CONFIG_NAME
from dar_jax.common.typing import Any
from dar_jax.evaluation.evaluators import evaluate_model
from dar_jax.evaluation.evaluators.base import Evaluation, Metrics
from dar_jax.parallel import distributed
from dar_jax.parallel.sharding import MeshConfig

MODEL_NAME = "model"
"""Subdirectory of `WORKDIR/evaluation`: a model whose evaluation is not finished."""


class TrainEvaluation:
    """Writes a model directory, evaluates it, and deletes it with all that was made of it.

    Each process evaluates on its own devices, which hold whole copies of the model meanwhile. An
    evaluation that a kill interrupts is finished by the run that resumes (`training.looks`).
    """

    def __init__(self, config: Any, workdir: str):
        """Load what models are judged by.

        Args:
            config: a dataclass of `evaluators.base.EvaluationBlocks`.
            workdir: of the run.

        Raises:
            ValueError: see `evaluators.base.Evaluation`.
        """
        # The training mesh is of all processes' devices.
        self._evaluation = Evaluation(dataclasses.replace(config, mesh=MeshConfig()), workdir)
        self._path = self._evaluation.directory / MODEL_NAME

    def __call__(self, write_model: Callable[[storage.Path], None]) -> dict[str, float]:
        """Evaluate; return metrics as they are logged, lists one by one.

        Args:
            write_model: writes the model directory, on process 0.

        Raises:
            ValueError: see `Evaluation`.
        """
        storage.make_directory(self._path.parent)
        failed = self._left_over()
        write_model(self._path)
        distributed.wait_for_all("the model to evaluate")
        subject = self._evaluation.load(str(self._path))
        if failed not in ("", subject.fingerprint):
            self._evaluation.forget(failed)
        metrics = evaluate_model(self._evaluation, subject)
        distributed.wait_for_all("the end of an evaluation")
        self._evaluation.forget(subject.fingerprint)
        if jax.process_index() == 0:
            (self._path / CONFIG_NAME).unlink()
            storage.delete_tree(self._path)
        return {f"eval/{name}": value for name, value in _one_by_one(metrics)}

    def _left_over(self) -> str:
        """Fingerprint of a model whose evaluation failed or was interrupted, or ""."""
        if jax.process_index() == 0:
            with contextlib.suppress(ValueError):
                return model_dir.fingerprint(model_dir.locate(self._path))
        return ""


def _one_by_one(metrics: Metrics) -> list[tuple[str, float]]:
    numbers = []
    for name, value in metrics.items():
        if not isinstance(value, list):
            numbers.append((name, value))
        elif not isinstance(value[0], tuple):
            numbers += [(f"{name}_{i}", item) for i, item in enumerate(value, 1)]
    return numbers
