"""Writing a directory of shards (see `shards`), in a folder or a bucket, by many processes.

Each takes a lease of the next shard that is not known to be whole (`parallel.leases`): the
processes of a job, or others that join at any time. What one that is gone had taken the others
write. A shard has `NAME.sha256` beside it, its digest and number of records, until the sidecar has
all of them. What an earlier command left is checked, and what is damaged is written again.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
from absl import logging
from jax.experimental import multihost_utils

from dar_jax.common import digests, storage
from dar_jax.common.files import read_regular, write_json
from dar_jax.common.typing import Any
from dar_jax.data import shards
from dar_jax.data.shards import DIGEST, DIGESTS, DIGESTS_KEY, ENDS, SIDECAR_NAME, Whole, shard_path
from dar_jax.parallel import distributed
from dar_jax.parallel.leases import Leases

POLL_SECONDS = 2.0
"""Between two looks for what other processes write."""
MAX_BYTES = 2**12


class Shard(NamedTuple):
    """A shard: its file, its place in its split, and the pictures that are in it."""

    path: storage.Path
    split: str
    number: int
    pictures: range


def write_splits(
    directory: storage.Path,
    contents: Mapping[str, Any],
    records: Callable[[str, range], Iterable[bytes]],
) -> None:
    """Write all shards of all splits, with other processes; those that are whole are kept.

    Args:
        directory: to write to; it must exist.
        contents: see `begin`; its `pictures` (by split) and `pictures_per_shard` say what is in
            a shard.
        records: split and range of pictures -> their records, in order.

    Raises:
        ValueError: the directory holds another data set.
        OSError: it cannot be written.
    """
    is_complete = begin(directory, contents)
    everything = _shards(directory, contents)
    begun = len(everything) * jax.process_index() // jax.process_count()
    todo = [*everything[begun:], *everything[:begun]]
    # The processes of a job share the checking of what is there.
    share = everything[jax.process_index() :: jax.process_count()]
    unchecked = {shard.path for shard in share} & set(storage.entries(directory))
    progress, changed = _Progress(len(todo)), False
    with Leases(directory) as leases:
        while todo:
            owners = {}
            for shard in [*todo]:
                if owner := leases.take(shard.path.name):
                    owners[shard.path.name] = owner
                    continue
                if not _is_whole(shard.path, check=shard.path in unchecked):
                    _beside(shard.path).unlink(missing_ok=True)
                    made = records(shard.split, shard.pictures)
                    _note(shard.path, shards.write_shard(shard.path, made))
                changed |= _beside(shard.path).exists()
                todo.remove(shard)
                progress.step(shard.path)
                leases.release(shard.path.name)
            if owners:
                name, owner = next(iter(owners.items()))
                logging.info("Waiting for %s, of %s", name, owner)
                time.sleep(POLL_SECONDS)
    changed = "True" in distributed.gather_texts(str(changed))
    if is_complete and not changed:
        logging.info("%s is complete, and its %d shards are whole", directory, len(everything))
        return
    finish(directory, contents, everything)


def begin(directory: storage.Path, contents: Mapping[str, Any]) -> bool:
    """Bind the directory to `contents`; called by every process.

    Args:
        directory: of the shards; it must exist.
        contents: JSON types that determine every shard; `kind` says what the records are.

    Returns:
        Whether it is complete already.

    Raises:
        ValueError: it holds something else.
        OSError: it cannot be written.
    """
    path = directory / SIDECAR_NAME
    distributed.of_first(lambda: path.exists() or write_json(path, {**contents, "complete": False}))
    sidecar = shards.read_json(path)
    for name, value in json.loads(json.dumps(contents)).items():
        if sidecar.get(name) != value:
            raise ValueError(
                f"{directory} holds a cache with other {name}; use the same config to finish it, "
                "or another workdir"
            )
    if sidecar.get("complete") is not True:
        return False
    known = sidecar.get(DIGESTS, {})
    if not DIGESTS_KEY.fits(known):
        found = shards.short(known)
        raise ValueError(f"{path} has {DIGESTS}={found}, expected {DIGESTS_KEY.expected}")
    return True


def finish(
    directory: storage.Path, contents: Mapping[str, Any], everything: Sequence[Shard]
) -> None:
    """Write what is known of all shards to the sidecar; called by every process, after its last.

    Raises:
        ValueError: a shard is missing.
        OSError: the directory cannot be written.
    """
    multihost_utils.sync_global_devices("shards written")
    distributed.of_first(lambda: _finish(directory, contents, everything))


def _finish(
    directory: storage.Path, contents: Mapping[str, Any], everything: Sequence[Shard]
) -> None:
    known = {shard.path.name: _known(shard.path) for shard in everything}
    counts: dict[str, list[int]] = {split: [] for split in contents["pictures"]}
    for shard in everything:
        whole = known[shard.path.name]
        if whole is None:
            raise ValueError(f"{shard.path} was lost; run the same command again")
        counts[shard.split].append(whole.count)
    found = {name: whole.digest for name, whole in sorted(known.items()) if whole}
    ends = {shard.path.name: shards.digest_of_ends(shard.path) for shard in everything}
    ending = {"counts": counts, DIGESTS: found, ENDS: ends, "complete": True}
    # As they will be read: tuples are lists in JSON.
    sidecar = json.loads(json.dumps({**contents, **ending}))
    write_json(directory / SIDECAR_NAME, {**sidecar, DIGEST: shards.digest_of(sidecar)})
    for shard in everything:
        _beside(shard.path).unlink(missing_ok=True)
    logging.info("Wrote %s: %s", directory, {split: sum(n) for split, n in counts.items()})


def _shards(directory: storage.Path, contents: Mapping[str, Any]) -> list[Shard]:
    size = contents["pictures_per_shard"]
    return [
        Shard(
            shard_path(directory, split, number, math.ceil(count / size)),
            split,
            number,
            range(count)[number * size :][:size],
        )
        for split, count in contents["pictures"].items()
        for number in range(math.ceil(count / size))
    ]


def _beside(path: storage.Path) -> storage.Path:
    """Where what is known of a shard is while others are being written."""
    return path.with_suffix(".sha256")


def _note(path: storage.Path, whole: Whole) -> None:
    _beside(path).write_text(f"{whole.digest} {whole.count}\n")


def _known(path: storage.Path) -> Whole | None:
    """What is known of a shard: beside it, or in a complete sidecar."""
    try:
        digest, count = read_regular(_beside(path), MAX_BYTES).decode().split()
        return Whole(digest, int(count))
    except (OSError, ValueError):
        pass  # a kill came before it was written, or the others have finished
    sidecar = shards.read_json(path.parent / SIDECAR_NAME)
    split, number = path.name.split("-")[:2]
    try:
        whole = Whole(sidecar[DIGESTS][path.name], sidecar["counts"][split][int(number)])
    except (KeyError, IndexError, TypeError):
        return None
    return whole if sidecar.get("complete") is True else None


def _is_whole(path: storage.Path, *, check: bool) -> bool:
    """Tell whether a shard is there, if so as it was written where that is to be checked.

    Raises:
        ValueError: a shard of which nothing is known is broken.
    """
    if not path.exists():
        return False
    known = _known(path)
    if known is None:
        # Shards appear whole: this one is older than digests, or a kill came before its own.
        count = shards.count_records(path)
        _note(path, Whole(digests.of_file(path), count))
    elif check and digests.of_file(path) != known.digest:
        logging.warning("%s is damaged or was cut short: it is written again", path)
        return False
    return True


class _Progress:
    """Logs each shard that is done, with the time that the others will take."""

    def __init__(self, num_shards: int):
        self._num_shards = num_shards
        self._done = 0
        self._start = time.monotonic()

    def step(self, path: storage.Path) -> None:
        self._done += 1
        seconds = (time.monotonic() - self._start) / self._done
        left = time.strftime("%H:%M:%S", time.gmtime(seconds * (self._num_shards - self._done)))
        logging.info(
            "%s | %d of %d | %.3g s a shard | %s left",
            path.name,
            self._done,
            self._num_shards,
            seconds,
            left,
        )
