"""Arrays on disk that grow in pieces, survive a kill and are made by several processes.

Row i of every array belongs to example i. Pieces appear whole or not at all under names that say
which rows they hold, so their names alone say what is missing; pieces that were damaged since, as
their check sums show, or whose own mark names other rows than their name, are deleted when a
directory is bound, and made again:

    manifest.json            what the rows depend on
    00000064-00000128.npz    arrays [64, ...] by name

Any number of processes may write one directory at the same time, in one job or started one by
one: each takes a lease of the next batch that lacks rows (`parallel.leases`), and what one that is
gone had taken the others make. At the end who has nothing else to do does not wait until a lease
has run out: what takes another much longer than its own batches took, it makes too. Both write the
same under the same name.
"""

import dataclasses
import functools
import json
import random
import re
import time
import zipfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from absl import logging

from dar_jax.common import digests, storage
from dar_jax.common.files import (
    ARCHIVE_ERRORS,
    parse_json,
    read_regular,
    replacing,
    write_npz,
)
from dar_jax.common.typing import Bool, Shaped
from dar_jax.parallel.leases import Leases

MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 2**24
POLL_SECONDS = 2.0
MIN_POLL_SECONDS = 0.1
"""Between two looks for what other processes write; as long as a batch, where that is between."""
SLOW = 3.0
"""Own batches in whose time another that writes nothing is taken for slow, or gone."""
NUM_THREADS = 8
"""Pieces that are checked at the same time."""


def is_whole_archive(path: storage.Path) -> bool:
    """Tell whether an `.npz` can be read and has the content that its check sums say."""
    try:
        with storage.open_binary(path) as file, zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except ARCHIVE_ERRORS:
        return False


def comment_of(path: storage.Path) -> str | None:
    """Return what an `.npz` says of itself; None where there is none that can be read."""
    try:
        with storage.open_binary(path) as file, zipfile.ZipFile(file) as archive:
            return archive.comment.decode(errors="replace")
    except ARCHIVE_ERRORS:
        return None


class _Work:
    """How long batches take this process, and how long it has had none."""

    def __init__(self):
        self._seconds: float | None = None
        self._idle_since = 0.0

    def timed(self, runs: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Yield the runs, and note the time that they take."""
        begin, count = time.monotonic(), 0
        for run in runs:
            yield run
            count += 1
            self._seconds = (time.monotonic() - begin) / count
        if count:
            self._idle_since = time.monotonic()

    def pause(self) -> float:
        """Seconds until another may have written a batch."""
        if self._seconds is None:
            return POLL_SECONDS
        return min(POLL_SECONDS, max(self._seconds, MIN_POLL_SECONDS))

    def is_slow(self) -> bool:
        """Tell whether another has had the time of several of this process's batches for one."""
        if self._seconds is None:
            return False
        return time.monotonic() - self._idle_since > max(SLOW * self._seconds, POLL_SECONDS / 2)


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The first `count` rows of the arrays in `directory`."""

    directory: storage.Path
    count: int

    piece_name = re.compile(r"(\d{8})-(\d{8})\.npz")
    """Name of a file, with its first row and the one after its last."""

    def bind(self, settings: Mapping[str, Any]) -> None:
        """Make the directory for rows of these settings, or check that it holds such rows.

        Args:
            settings: whatever the rows depend on, as JSON types.

        Raises:
            ValueError: it holds rows of other settings, or cannot be read.
        """
        text = json.dumps(settings, indent=2) + "\n"
        path = self.directory / MANIFEST_NAME
        # In this order: another process writes its manifest before its pieces.
        pieces = self._pieces()
        if path.exists():
            self._compare(self._read_manifest(path), json.loads(text))
            self._delete_damaged([piece for _, _, piece in pieces])
        elif pieces:
            raise ValueError(f"{self.directory} has pieces but no {MANIFEST_NAME}; delete it")
        else:
            storage.make_directory(self.directory)
            with replacing(path) as temporary:
                temporary.write_text(text)

    def _read_manifest(self, path: storage.Path) -> dict[str, Any]:
        try:
            found = parse_json(read_regular(path, MAX_MANIFEST_BYTES))
            if not isinstance(found, dict):
                raise ValueError("expected a JSON object")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"cannot read {path} ({error}), so what {self.directory} is made with is not "
                "known; choose another --workdir or delete that directory"
            ) from error
        return found

    def _delete_damaged(self, paths: Sequence[storage.Path]) -> None:
        """Delete damaged pieces; every process does, and so knows what is missing."""
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            for path, is_whole in zip(paths, pool.map(self._is_whole, paths), strict=True):
                if not is_whole:
                    logging.warning("%s is damaged: it is made again", path)
                    path.unlink(missing_ok=True)

    def _is_whole(self, path: storage.Path) -> bool:
        """Tell whether a piece has the content that its check sums say, and the rows of its name.

        One that is older than marks has none.
        """
        return is_whole_archive(path) and comment_of(path) in ("", self._mark(path))

    def _mark(self, path: storage.Path) -> str:
        """What a piece of this name says of itself: its rows, and what they are made with."""
        return f"{path.stem} of {self._made_with}"

    @functools.cached_property
    def _made_with(self) -> str:
        path = self.directory / MANIFEST_NAME
        return digests.of_json(self._read_manifest(path))[: digests.SHORT] if path.exists() else ""

    def _compare(self, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        for name in {**found, **expected}:
            if found.get(name) != expected.get(name):
                raise ValueError(
                    f"{self.directory} is made with {name}={found.get(name)}, not "
                    f"{expected.get(name)}; choose another --workdir or delete that directory"
                )

    def missing(self) -> Bool[np.ndarray, " N"]:
        """True for every row that is not there yet."""
        missing = np.ones(self.count, bool)
        for first, stop, _ in self._pieces():
            missing[first:stop] = False
        return missing

    def rounds(self, batch_size: int) -> Generator[Iterator[tuple[int, int]], None, None]:
        """Share the work with other processes, until no row is missing.

        Yields rounds: each is an iterator of runs (first, stop) of missing rows, at most
        `batch_size` long, that are to be written before the next round. Most of the time there is
        one; others come where a process that had taken a batch has not written it.
        """
        work = _Work()
        if not self.missing().any():
            Leases(self.directory).sweep()  # a killed process may have left some
            return
        with Leases(self.directory) as leases:
            while self.missing().any():
                owners: dict[str, str] = {}
                yield work.timed(self._claimed(leases, batch_size, owners))
                leases.release_all()
                # In any order: others that are idle choose as well.
                for batch, owner in random.sample([*owners.items()], len(owners)):
                    start = int(batch)
                    if not self.missing()[start : start + batch_size].any():
                        continue
                    if work.is_slow():
                        logging.info("Making rows from %d on as well as %s", start, owner)
                        yield self._runs(start, batch_size)
                    else:
                        logging.info("Waiting for rows from %d on, of %s", start, owner)
                        time.sleep(work.pause())
                        break
            leases.sweep()

    def _claimed(
        self, leases: Leases, batch_size: int, owners: dict[str, str]
    ) -> Iterator[tuple[int, int]]:
        """Yield the runs of every batch that nobody has; put the others in `owners`.

        Batches are told by their place in the set, not by what is missing, which changes while
        others write. The processes of a job begin at different ones.
        """
        starts = range(0, self.count, batch_size)
        begin = len(starts) * jax.process_index() // jax.process_count()
        for start in [*starts[begin:], *starts[:begin]]:
            name, missing = f"{start:08d}", self.missing()
            for held in leases.held():
                if not missing[int(held) : int(held) + batch_size].any():
                    leases.release(held)
            if not missing[start : start + batch_size].any():
                continue
            if owner := leases.take(name):
                owners[name] = owner
                continue
            # Once more: another may have written them before it returned its lease.
            yield from self._runs(start, batch_size)

    def _runs(self, start: int, batch_size: int) -> Iterator[tuple[int, int]]:
        """The runs of missing rows of a batch."""
        window = np.pad(self.missing()[start : start + batch_size].astype(int), 1)
        edges = np.flatnonzero(np.diff(window)).reshape(-1, 2)
        return ((start + int(first), start + int(stop)) for first, stop in edges)

    def save(self, first: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write a piece: the rows from `first` on of every array."""
        (length,) = {len(rows) for rows in arrays.values()}
        path = self.directory / f"{first:08d}-{first + length:08d}.npz"
        write_npz(path, arrays, comment=self._mark(path))

    def names(self) -> tuple[str, ...]:
        """Names of the arrays, as the first piece has them.

        Raises:
            ValueError: there is not a piece.
        """
        for _, _, path in self._pieces():
            with storage.open_binary(path) as file, np.load(file) as arrays:
                return tuple(arrays.files)
        raise ValueError(f"{self.directory} has no pieces")

    def rows(
        self, name: str, first: int = 0, stop: int | None = None
    ) -> Iterator[Shaped[np.ndarray, "n ..."]]:
        """Yield the rows `first` .. `stop - 1` of an array in order, piece by piece.

        Raises:
            ValueError: a row is missing, a piece cannot be read, or rows differ in shape.
        """
        stop = self.count if stop is None else stop
        known, shape = first, None
        for start, end, path in self._pieces():
            if end <= known:
                continue
            if known >= stop or start > known:
                break
            rows = self._read(path, name)[known - start : stop - start]
            shape = shape or rows.shape[1:]
            if rows.shape[1:] != shape:
                raise ValueError(f"{path} holds {name} of {rows.shape[1:]}, others {shape}")
            known = min(end, stop)
            yield rows
        if known < stop:
            raise ValueError(f"{self.directory} lacks row {known} of {self.count}")

    def array(self, name: str) -> Shaped[np.ndarray, "N ..."]:
        """Read a whole array; see `rows`."""
        return np.concatenate(list(self.rows(name)))

    def _pieces(self) -> list[tuple[int, int, storage.Path]]:
        """(first, stop, path) of every piece, in order."""
        pieces = []
        for path in storage.entries(self.directory):
            if match := self.piece_name.fullmatch(path.name):
                first, stop = int(match[1]), match[2]
                pieces.append((first, int(stop or first + 1), path))
        return sorted(pieces)

    def _read(self, path: storage.Path, name: str) -> Shaped[np.ndarray, "n ..."]:
        try:
            with storage.open_binary(path) as file, np.load(file) as arrays:
                return arrays[name]
        except ARCHIVE_ERRORS as error:
            raise ValueError(f"cannot read {path} ({error}); delete it and run again") from error
