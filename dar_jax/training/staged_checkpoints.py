"""Where checkpoints are made, and how they get to where they are kept.

Orbax writes to folders and to gs://, and there they are made in place. To s3:// it does not write:

    TMPDIR/dar_jax-checkpoints-HOST-PROCESS-*/8     made here by Orbax, or copied to resume from
    s3://BUCKET/DIR/checkpoints/8/...               sent before the save is over
    s3://BUCKET/DIR/checkpoints/8/digests.json      comes last and goes first

What is in the bucket counts: a step that has no digests there is none, and the next run deletes it.
"""

import os
import pathlib
import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor

import jax
from absl import logging
from orbax.checkpoint import checkpoint_managers

from dar_jax.common import addresses, digests, storage
from dar_jax.common.files import host, is_alive

DAMAGED_SUFFIX = ".damaged"
"""Of the names under which damaged checkpoints are set aside."""
TEMPORARY = ".orbax-checkpoint-tmp*"
"""What follows the step in the names of checkpoints that are being written."""
STAGED = ("s3",)
"""Schemes of buckets to which Orbax cannot write."""
PREFIX = "dar_jax-checkpoints-"


def is_staged(directory: str | os.PathLike) -> bool:
    """Tell whether checkpoints are made elsewhere and sent to a directory."""
    return addresses.scheme_of(directory) in STAGED


def check_processes(directory: str | os.PathLike) -> None:
    """Raise ValueError where several processes would have to send their parts to a directory."""
    if is_staged(directory) and jax.process_count() > 1:
        mount = addresses.service_of(directory).mount
        raise ValueError(
            f"{directory}: {jax.process_count()} processes cannot train in "
            f"{addresses.scheme_of(directory)}://; use gs://BUCKET/DIR, or mount the bucket "
            f"({mount}) and give the path below DIR"
        )


def complete_steps(directory: storage.Path) -> list[int]:
    """Steps of which all is in a bucket, the latest first."""
    steps = _steps(directory)
    with ThreadPoolExecutor(storage.NUM_THREADS) as pool:
        found = pool.map(lambda step: digests.has(directory / str(step)), steps)
    return [step for step, is_complete in zip(steps, found, strict=True) if is_complete]


def _steps(directory: storage.Path) -> list[int]:
    names = [path.name for path in storage.entries(directory)]
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


class Place:
    """Checkpoints that are made where they are kept.

    Attributes:
        folder: where Orbax writes them.
        policy: which of those it keeps.
    """

    def __init__(self, directory: storage.Path, keep: int, keep_every: int):
        """Remember what is kept: so many of the latest, and multiples of a step unless it is 0."""
        self._directory, self._keep, self._keep_every = directory, keep, keep_every
        self.folder = directory
        policies: list[checkpoint_managers.PreservationPolicy] = [checkpoint_managers.LatestN(keep)]
        if keep_every:
            policies.append(checkpoint_managers.EveryNSteps(keep_every))
        self.policy = checkpoint_managers.AnyPreservationPolicy(policies)

    def fetch(self, step: int) -> storage.Path:
        """Return the path of a checkpoint in `folder`."""
        return self.folder / str(step)

    def set_aside(self, step: int) -> None:
        """Rename a damaged checkpoint, whose step is to be saved again."""
        number = 0
        while (aside := self._directory / f"{step}-{number}{DAMAGED_SUFFIX}").exists():
            number += 1
        self._move(step, aside)

    def _move(self, step: int, target: storage.Path) -> None:
        (self._directory / str(step)).rename(target)

    def clean(self) -> None:
        """Delete what a kill left of checkpoints, but not of one that may be in the making."""
        if storage.is_remote(self.folder) or jax.process_index():
            return
        latest = max(_steps(self.folder), default=-1)
        for path in self.folder.glob(f"*{TEMPORARY}"):
            step = path.name.partition(".")[0]
            if step.isdecimal() and int(step) <= latest:
                logging.warning("%s is not complete: deleting it", path)
                shutil.rmtree(path, ignore_errors=True)

    def keep(self, step: int, made: storage.Path) -> None:
        """Bring a checkpoint that has its digests from `made`, below `folder`, to its place."""

    def delete_old(self) -> None:
        """Delete what is not to be kept and a kill let be."""

    def close(self) -> None:
        """Delete what is no longer needed here."""


class _Staged(Place):
    """Checkpoints that are made in a local folder, of one process, and sent to a bucket."""

    def __init__(self, directory: storage.Path, keep: int, keep_every: int):
        check_processes(directory)
        super().__init__(directory, keep, keep_every)
        _sweep()
        self._temporary = tempfile.TemporaryDirectory(
            prefix=f"{PREFIX}{host()}-{os.getpid()}-", ignore_cleanup_errors=True
        )
        self.folder = pathlib.Path(self._temporary.name)
        self.policy = checkpoint_managers.LatestN(1)  # the bucket has the others

    def fetch(self, step: int) -> storage.Path:
        source, target = self._directory / str(step), self.folder / str(step)
        names = [path.relative_to(source).as_posix() for path in storage.files_below(source)]
        storage.download(source, names, target)
        return target

    def _move(self, step: int, target: storage.Path) -> None:
        storage.copy_tree(self._directory / str(step), target)  # the one here may be the damaged
        self._delete(step)
        shutil.rmtree(self.folder / str(step))

    def clean(self) -> None:
        for step in {*_steps(self._directory)} - {*complete_steps(self._directory)}:
            logging.warning("%s is not complete: deleting it", self._directory / str(step))
            self._delete(step)

    def keep(self, step: int, made: storage.Path) -> None:
        self._delete(step)  # names of files differ from save to save
        storage.upload_tree(
            pathlib.Path(made), self._directory / str(step), last=digests.DIGESTS_NAME
        )
        self.delete_old()

    def delete_old(self) -> None:
        for step in complete_steps(self._directory)[self._keep :]:
            if not self._keep_every or step % self._keep_every:
                self._delete(step)

    def _delete(self, step: int) -> None:
        path = self._directory / str(step)
        (path / digests.DIGESTS_NAME).unlink(missing_ok=True)
        storage.delete_tree(path)

    def close(self) -> None:
        self._temporary.cleanup()


def place_of(directory: storage.Path, keep: int, keep_every: int) -> Place:
    """Return where the checkpoints of a directory are made.

    Args:
        directory: where they are kept.
        keep: number of latest checkpoints that are kept.
        keep_every: those of multiples of this step are kept as well; 0: none.

    Raises:
        ValueError: see `check_processes`.
    """
    return (_Staged if is_staged(directory) else Place)(directory, keep, keep_every)


def _sweep() -> None:
    """Delete the folders of processes of this host that are no more."""
    own = re.compile(rf"{PREFIX}{re.escape(host())}-(\d+)-\w+")
    for path in pathlib.Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if (match := own.fullmatch(path.name)) and not is_alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)
