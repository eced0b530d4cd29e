"""Checkpoints of the whole run: train state, position in the data, configuration (Orbax).

Saving is asynchronous and atomic: a step directory appears under its final name only when it is
complete, so a killed run resumes from the last complete one.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import grain
import orbax.checkpoint as ocp
from absl import logging

from dar_jax.common import tree
from dar_jax.training.state import TrainState

ABSENT = "(absent)"


class Checkpoints:
    """The checkpoints of one workdir, all made with one configuration."""

    def __init__(self, directory: pathlib.Path, config: Mapping[str, Any], keep: int):
        """Open or create `directory`.

        Args:
            directory: an absolute path.
            config: the part of the configuration that a checkpoint is bound to, as JSON types.
            keep: number of latest checkpoints that are kept.

        Raises:
            ValueError: the latest checkpoint was made with another configuration. Nothing is
                written then.
        """
        self._directory = directory
        self._config = json.loads(json.dumps(config))
        self._manager = ocp.CheckpointManager(
            directory, options=ocp.CheckpointManagerOptions(max_to_keep=keep)
        )
        if self.latest_step is not None:
            self._check_config()

    @property
    def latest_step(self) -> int | None:
        """The last complete step, or None."""
        return self._manager.latest_step()

    def describe_latest(self) -> str:
        """Name the last complete checkpoint, waiting for a save under way."""
        self._manager.wait_until_finished()
        if self.latest_step is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self._directory / str(self.latest_step)}"

    def save(self, state: TrainState, step: int, iterator: grain.DatasetIterator) -> None:
        """Save in the background; `state` may be donated and `iterator` advanced right after."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=grain.checkpoint.CheckpointSave(iterator),
                config=ocp.args.JsonSave(self._config),
            ),
        )

    def restore(self, abstract: TrainState, iterator: grain.DatasetIterator) -> TrainState:
        """Load the latest checkpoint, bitwise, and move `iterator` to where it was.

        Args:
            abstract: a `TrainState` of `ShapeDtypeStruct`s, whose shardings may differ from
                those that the checkpoint was saved with.
            iterator: a fresh iterator of the same pipeline; changed in place.
        """
        logging.info("Resuming from step %d of %s", self.latest_step, self._directory)
        restored = self._manager.restore(
            self.latest_step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract),
                data=grain.checkpoint.CheckpointRestore(iterator),
            ),
        )
        return restored.state

    def close(self) -> None:
        """Wait for a save under way."""
        self._manager.close()

    def _check_config(self) -> None:
        args = ocp.args.Composite(config=ocp.args.JsonRestore())
        saved = tree.flatten(self._manager.restore(self.latest_step, args=args).config)
        wanted = tree.flatten(self._config)
        for name in sorted(saved.keys() | wanted.keys()):
            old, new = saved.get(name, ABSENT), wanted.get(name, ABSENT)
            if old != new:
                raise ValueError(
                    f"{self._directory} holds a checkpoint with {name.replace('/', '.')}={old!r}, "
                    f"the config has {new!r}; use the same config or another workdir"
                )
