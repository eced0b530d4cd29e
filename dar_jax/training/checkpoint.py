"""Checkpoints of the whole run: train state, position in the data, configuration (Orbax).

Saving is asynchronous and atomic: a step directory appears under its final name only when it is
complete, or, in a bucket, with a marker that is written last (`commit_success.txt`, or what
`training.staged_checkpoints` says), so a killed run resumes from the last complete one. With it
come the digests of its files (`common.digests`): one that is damaged is set aside, and the run
resumes from the one before.
Nothing in a checkpoint depends on the mesh or the number of processes that wrote it.
"""

import contextlib
import json
import os
import types
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from absl import logging

from dar_jax.common import digests, storage
from dar_jax.parallel import distributed
from dar_jax.training import origin, staged_checkpoints
from dar_jax.training.state import TrainState

CHECKPOINTS = "checkpoints"
"""Subdirectory of the workdir that holds them."""
UNFINISHED = "_CHECKPOINT_METADATA"
"""Times of a checkpoint, which Orbax writes last and no item needs."""
SAVE_ERRORS = (OSError, RuntimeError, ValueError)
"""What the storage layers raise when they cannot write."""
READ_ERRORS = (*SAVE_ERRORS, KeyError, TypeError, AttributeError, AssertionError)
"""What they raise when they cannot read."""


def latest_step(directory: storage.Path) -> int | None:
    """Step of the last complete checkpoint of a directory, which need not exist; None: none."""
    return max(_steps(directory), default=None)


def _steps(directory: storage.Path) -> list[int]:
    """Complete checkpoints, the latest first; whatever else lies there is passed over."""
    if not directory.is_dir():
        return []
    if staged_checkpoints.is_staged(directory):
        return staged_checkpoints.complete_steps(directory)
    complete = sorted(set(ocp.utils.checkpoint_steps(directory)), reverse=True)
    return [step for step in complete if (directory / str(step)).is_dir()]


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
        directory: storage.Path,
        config: Mapping[str, Any],
        *,
        keep: int,
        keep_every: int = 0,
        defaults: Mapping[str, Any] = types.MappingProxyType({}),
        allowed: Collection[str] = (),
    ):
        """Open or create `directory`.

        Args:
            directory: an absolute path, shared by all processes.
            config: what a checkpoint is bound to, as JSON types; see `origin.find_changes`.
            keep: number of latest checkpoints that are kept.
            keep_every: checkpoints of multiples of this step are kept as well; 0: none.
            defaults: of `config`: what checkpoints were made with that do not know a key yet.
            allowed: keys of `config`, or of blocks in it, that may have changed.

        Raises:
            ValueError: the latest checkpoint was made with another configuration, all are damaged,
                there is no folder, or several processes cannot write there. Nothing is written
                then.
        """
        is_there = os.path.lexists(directory) or directory.exists()
        if is_there and not directory.is_dir():
            raise ValueError(f"{directory} is no folder for checkpoints; move it away")
        self._directory = directory
        self._config = json.loads(json.dumps(config))
        self._defaults = json.loads(json.dumps(dict(defaults)))
        self._place = staged_checkpoints.place_of(directory, keep, keep_every)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._place.policy,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._finish),
        )
        good, damaged = self._verify()
        self._manager = _Manager(self._place.folder, options=options)
        self.changes = {} if good is None else self._check_config(good, allowed)
        self._set_aside(damaged)
        self._place.clean()

    changes: Mapping[str, tuple[Any, Any]]
    """What was allowed to change and has: old and new values by key."""

    @property
    def latest_step(self) -> int | None:
        """The last complete step, or None."""
        return latest_step(self._directory)

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
        report: Mapping[str, Any] = types.MappingProxyType({"metrics": ()}),
    ) -> None:
        """Save in the background; `state` may be donated and `iterator` advanced right after.

        Args:
            state: after `step` updates.
            step: names the checkpoint.
            iterator: whose state must be the same on all processes.
            report: what `training.report` goes on from, as JSON types.

        Raises:
            ValueError: this save or the one before it failed.
        """
        with self._explained_failure():
            self._manager.wait_until_finished()  # as `save` does, before it looks at another step
            self._saving = step
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave(iterator.get_state()),
                    interval=ocp.args.JsonSave(dict(report)),
                    config=ocp.args.JsonSave(self._config),
                ),
            )

    def check(self) -> None:
        """Raise ValueError if a save in the background has failed."""
        with self._explained_failure():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Wait for a save under way, after which no more are left than are kept.

        Raises:
            ValueError: it failed.
        """
        with self._explained_failure():
            self._manager.wait_until_finished()
            self._place.delete_old()

    def restore(
        self, abstract: TrainState, iterator: grain.DatasetIterator
    ) -> tuple[TrainState, dict[str, Any]]:
        """Load the latest checkpoint, bitwise, and move `iterator` to where it was.

        Returns the state, and the report as it was saved.

        Args:
            abstract: a `TrainState` of `ShapeDtypeStruct`s, whose shardings may differ from
                those that the checkpoint was saved with.
            iterator: a fresh iterator of the same pipeline; changed in place.

        Raises:
            ValueError: the checkpoint does not fit, cannot be read, or has another step's name.
        """
        step = self.latest_step
        logging.info("Resuming from step %d of %s", step, self._directory)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract),
            data=ocp.args.JsonRestore(),
            interval=ocp.args.JsonRestore(),
        )
        with self._explained_damage(step):
            restored: Any = self._manager.restore(step, args=args)
            iterator.set_state(restored.data)
            saved = restored.interval
            report = {"metrics": saved["metrics"], "written": saved.get("written", {})}
        if int(restored.state.step) != step:
            # Orbax would save no step before the latest, without a word.
            raise ValueError(
                f"{self._directory / str(step)} is the checkpoint of step "
                f"{int(restored.state.step)}: give it that name, or move it away"
            )
        return restored.state, report

    def close(self) -> None:
        """Stop the background threads; a save under way ends first, and its failure is dropped."""
        with contextlib.suppress(*SAVE_ERRORS):
            self._manager.close()
        self._place.close()

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

    @contextlib.contextmanager
    def _explained_damage(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except READ_ERRORS as error:
            (reason, *_) = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(
                f"the checkpoint {self._directory / str(step)} cannot be read, or is of another "
                f"model ({reason}); move it away to go on from the one before"
            ) from error

    def _finish(self) -> None:
        """Add the digests to a checkpoint before it gets its final name; in the background."""
        if jax.process_index() == 0:
            folder = self._place.folder
            written = [*folder.glob(f"{self._saving}{staged_checkpoints.TEMPORARY}")]
            if storage.is_remote(folder):  # under its final name, complete with a marker
                written = [folder / str(self._saving)]
            for directory in written:
                if not digests.has(directory):
                    digests.write(directory, but=[UNFINISHED])
                    self._place.keep(self._saving, directory)

    def _verify(self) -> tuple[int | None, dict[int, str]]:
        """Find the latest checkpoint that is whole, and what is wrong with those after it."""

        def read() -> list[tuple[int, str]]:
            found = []
            for step in _steps(self._directory):
                found.append((step, _find_damage(self._place.fetch(step))))
                if not found[-1][1]:
                    break
            return found

        found = distributed.of_first(read)
        damaged = {step: reason for step, reason in found if reason}
        good = next((step for step, reason in found if not reason), None)
        if damaged and good is None:
            raise ValueError(
                f"all checkpoints in {self._directory} are damaged: {_list_damage(damaged)}; bring "
                "one back from a copy, or begin anew in another workdir"
            )
        return good, damaged

    def _set_aside(self, damaged: Mapping[int, str]) -> None:
        """Rename damaged checkpoints, whose steps are to be saved again."""
        if not damaged:
            return
        logging.warning(
            "%s: damaged and set aside under names *%s: %s",
            self._directory,
            staged_checkpoints.DAMAGED_SUFFIX,
            _list_damage(damaged),
        )
        distributed.of_first(lambda: [self._place.set_aside(step) for step in damaged])
        self._manager.reload()

    def _check_config(self, step: int, allowed: Collection[str]) -> dict[str, tuple[Any, Any]]:
        args = ocp.args.Composite(config=ocp.args.JsonRestore())
        with self._explained_damage(step):
            restored: Any = self._manager.restore(step, args=args)
        changes = origin.find_changes(restored.config, self._config, self._defaults)
        origin.check_allowed(changes, allowed, str(self._directory))
        return changes


def _find_damage(directory: storage.Path) -> str:
    if digests.has(directory):
        return digests.find_damage(directory)
    if not (directory / "state").is_dir():
        return "it is no checkpoint"
    logging.warning("%s has no digests: it is taken as it is", directory)
    return ""


def _list_damage(damaged: Mapping[int, str]) -> str:
    return "; ".join(f"step {step}, {reason}" for step, reason in damaged.items())
