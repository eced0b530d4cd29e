"""Checkpoints of the whole run: train state, position in the data, configuration (Orbax).

Saving is asynchronous and atomic: a step directory appears under its final name only when it is
complete, so a killed run resumes from the last complete one. Nothing in a checkpoint depends on
the mesh or the number of processes that wrote it.
"""

import contextlib
import json
import pathlib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from dar_jax.common import tree
from dar_jax.training.state import TrainState

CHECKPOINTS = "checkpoints"
"""Subdirectory of the workdir that holds them."""
ABSENT = "(absent)"
SAVE_ERRORS = (OSError, RuntimeError, ValueError)
"""What the storage layers raise when they cannot write."""


def has_any(directory: pathlib.Path) -> bool:
    """Tell whether a directory, which need not exist, holds a complete checkpoint."""
    return directory.is_dir() and bool(ocp.utils.checkpoint_steps(directory))


class _Manager(ocp.CheckpointManager):
    """Leaves preemption to the training loop.

    Orbax asks JAX about it from a background thread, with the step that is being saved: that would
    move this process back in the agreement on the step to stop at.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of one workdir, all made with one configuration."""

    def __init__(
        self,
        directory: pathlib.Path,
        config: Mapping[str, Any],
        *,
        keep: int,
        keep_every: int = 0,
        defaults: Mapping[str, Any] = types.MappingProxyType({}),
    ):
        """Open or create `directory`.

        Args:
            directory: an absolute path, shared by all processes.
            config: the part of the configuration that a checkpoint is bound to, as JSON types.
            keep: number of latest checkpoints that are kept.
            keep_every: checkpoints of multiples of this step are kept as well; 0: none.
            defaults: of `config`: what checkpoints were made with that do not know a key yet.

        Raises:
            ValueError: the latest checkpoint was made with another configuration. Nothing is
                written then.
        """
        self._directory = directory
        self._config = json.loads(json.dumps(config))
        self._defaults = json.loads(json.dumps(dict(defaults)))
        policies: list[checkpoint_managers.PreservationPolicy] = [checkpoint_managers.LatestN(keep)]
        if keep_every:
            policies.append(checkpoint_managers.EveryNSteps(keep_every))
        kept = checkpoint_managers.AnyPreservationPolicy(policies)
        options = ocp.CheckpointManagerOptions(preservation_policy=kept)
        self._manager = _Manager(directory, options=options)
        if self.latest_step is not None:
            self._check_config()

    @property
    def latest_step(self) -> int | None:
        """The last complete step, or None."""
        return max(ocp.utils.checkpoint_steps(self._directory), default=None)

    def describe_latest(self, *, wait: bool = True) -> str:
        """Name the last complete checkpoint, if told so after a save under way."""
        if wait:
            with contextlib.suppress(*SAVE_ERRORS):
                self._manager.wait_until_finished()
        if self.latest_step is None:
            return "there is not a checkpoint yet"
        return f"the last good checkpoint is {self._directory / str(self.latest_step)}"

    def save(
        self,
        state: TrainState,
        step: int,
        iterator: grain.DatasetIterator,
        interval: Sequence[Any] = (),
    ) -> None:
        """Save in the background; `state` may be donated and `iterator` advanced right after.

        Args:
            state: after `step` updates.
            step: names the checkpoint.
            iterator: whose state must be the same on all processes.
            interval: metrics of a logging interval that is not over, as JSON types.

        Raises:
            ValueError: this save or the one before it failed.
        """
        with self._explained_failure():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave(iterator.get_state()),
                    interval=ocp.args.JsonSave({"metrics": list(interval)}),
                    config=ocp.args.JsonSave(self._config),
                ),
            )

    def check(self) -> None:
        """Raise ValueError if a save in the background has failed."""
        with self._explained_failure():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Wait for a save under way.

        Raises:
            ValueError: it failed.
        """
        with self._explained_failure():
            self._manager.wait_until_finished()

    def restore(
        self, abstract: TrainState, iterator: grain.DatasetIterator
    ) -> tuple[TrainState, list[Any]]:
        """Load the latest checkpoint, bitwise, and move `iterator` to where it was.

        Returns the state, and the metrics of the interval as they were saved.

        Args:
            abstract: a `TrainState` of `ShapeDtypeStruct`s, whose shardings may differ from
                those that the checkpoint was saved with.
            iterator: a fresh iterator of the same pipeline; changed in place.
        """
        step = self.latest_step
        logging.info("Resuming from step %d of %s", step, self._directory)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract),
            data=ocp.args.JsonRestore(),
            interval=ocp.args.JsonRestore(),
        )
        restored: Any = self._manager.restore(step, args=args)
        iterator.set_state(restored.data)
        return restored.state, restored.interval["metrics"]

    def close(self) -> None:
        """Stop the background threads; a save under way ends first, and its failure is dropped."""
        with contextlib.suppress(*SAVE_ERRORS):
            self._manager.close()

    @contextlib.contextmanager
    def _explained_failure(self) -> Iterator[None]:
        try:
            yield
        except SAVE_ERRORS as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"saving to {self._directory} failed: {reason}; {self.describe_latest()}; make "
                "room and run the same command to go on from there"
            ) from error

    def _check_config(self) -> None:
        args = ocp.args.Composite(config=ocp.args.JsonRestore())
        restored: Any = self._manager.restore(self.latest_step, args=args)
        saved = tree.flatten(restored.config)
        wanted, defaults = tree.flatten(self._config), tree.flatten(self._defaults)
        for name in sorted(saved.keys() | wanted.keys()):
            old, new = saved.get(name, defaults.get(name, ABSENT)), wanted.get(name, ABSENT)
            if old != new:
                raise ValueError(
                    f"{self._directory} holds a checkpoint with {name.replace('/', '.')}={old!r}, "
                    f"the config has {new!r}; use the same config or another workdir"
                )
