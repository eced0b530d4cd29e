"""A directory of ArrayRecord shards with a JSON sidecar that says what they hold.

    dataset.json                            the contents, and whether all of it is there
    train-00000-of-00012.array_record
    test-00000-of-00001.array_record

Shards and sidecar appear whole or not at all. The sidecar is written first with `complete` false
and at the end with `complete` true: so a directory that was cut short is told apart from a whole
one, and the same command can finish it, but no other.

Every shard has a digest, beside it while others are being written and then in the sidecar. The
command that writes a directory checks all of them, and writes what is damaged again; whoever reads
records is told by ArrayRecord's own hashes.
"""

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import grain
import jax
from absl import logging
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jax.experimental import multihost_utils

from dar_jax.common import digests, storage
from dar_jax.common.files import parse_json, read_regular, replacing, write_json
from dar_jax.common.typing import Any
from dar_jax.data.base import MAX_JSON_BYTES, SPLITS
from dar_jax.parallel import distributed

SIDECAR_NAME = "dataset.json"


class Key(NamedTuple):
    """What a value of the sidecar has to be.

    Attributes:
        expected: it, in words.
        fits: tells whether a value is it.
    """

    expected: str
    fits: Callable[[Any], bool]


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _are(values: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(values, list) and all(map(fits, values))


NATURAL = Key("a whole number from 0", lambda value: _is_int(value, 0))
POSITIVE = Key("a positive whole number", lambda value: _is_int(value, 1))
POSITIVES = Key("positive whole numbers", lambda value: bool(value) and _are(value, POSITIVE.fits))
TEXT = Key("a text", lambda value: isinstance(value, str))
KEYS = {
    "class_names": Key("names of classes", lambda value: bool(value) and _are(value, TEXT.fits)),
    "counts": Key(
        f"lists of counts by split, {', '.join(SPLITS)}",
        lambda value: (
            isinstance(value, dict)
            and all(_are(value.get(split), NATURAL.fits) for split in SPLITS)
        ),
    ),
}
"""Keys of every sidecar of a complete cache."""
DIGESTS = "digests"
DIGESTS_KEY = Key(
    "digests by shard",
    lambda value: isinstance(value, dict) and all(map(TEXT.fits, value.values())),
)
MAX_SHOWN = 40
"""Characters of a wrong value that are shown."""
WRITER_OPTIONS = "group_size:1"
"""One record per chunk, which random access reads fastest."""


def shard_path(directory: pathlib.Path, split: str, shard: int, num_shards: int) -> pathlib.Path:
    """Name the file of a shard."""
    return directory / f"{split}-{shard:05d}-of-{num_shards:05d}.array_record"


def write_shard(path: pathlib.Path, records: Iterable[bytes]) -> int:
    """Write a shard, whole or not at all, and return its number of records.

    Raises:
        OSError: it cannot be written.
    """
    count = 0
    with replacing(path) as temporary:
        temporary.touch()  # an OSError that says why, where the writer's would not
        writer = ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
        try:
            for count, record in enumerate(records, start=1):  # noqa: B007
                with _errors_of_system(path):
                    writer.write(record)
        finally:
            with _errors_of_system(path):
                writer.close()
    return count


@contextlib.contextmanager
def _errors_of_system(path: pathlib.Path) -> Iterator[None]:
    """Raise OSError for what the writer makes of one."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"cannot write {path}: {str(error).partition(';')[0]}") from error


def write_splits(
    directory: pathlib.Path,
    contents: Mapping[str, Any],
    records: Callable[[str, range], Iterable[bytes]],
) -> None:
    """Write all shards of all splits; those that are there already are kept.

    Each process writes every P-th shard.

    Args:
        directory: to write to; it must exist.
        contents: see `begin`; its `pictures` (by split) and `pictures_per_shard` say what is in
            a shard.
        records: split and range of pictures -> their records, in order.

    Raises:
        ValueError: the directory holds another data set.
        OSError: it cannot be written.
    """
    known = begin(directory, contents)
    size = contents["pictures_per_shard"]
    num_shards = {split: math.ceil(n / size) for split, n in contents["pictures"].items()}
    progress = _Progress(sum(num_shards.values()))
    found, written = {}, 0
    for split, number in num_shards.items():
        for shard in range(jax.process_index(), number, jax.process_count()):
            path = shard_path(directory, split, shard, number)
            digest = _digest_if_whole(path, known)
            if not digest:
                pictures = range(contents["pictures"][split])[shard * size :][:size]
                _digest_path(path).unlink(missing_ok=True)
                write_shard(path, records(split, pictures))
                digest = digests.of_file(path)
                _digest_path(path).write_text(digest)
                written += 1
            found[path.name] = digest
            progress.step(path)
    written = sum(map(int, distributed.gather_texts(str(written))))
    if known and not written:
        logging.info("%s is complete, and its %d shards are whole", directory, len(known))
        return
    counts = finish(directory, contents, num_shards, found)
    logging.info("Wrote %s: %s", directory, {split: sum(n) for split, n in counts.items()})


def _digest_path(path: pathlib.Path) -> pathlib.Path:
    """Where the digest of a shard is while others are being written."""
    return path.with_suffix(".sha256")


def _digest_if_whole(path: pathlib.Path, known: Mapping[str, str] | None) -> str:
    """Return the digest of a shard that is there as it was written, else "".

    Args:
        path: of the shard.
        known: digests of a complete directory by name, none where it is older than these; None
            where it is not complete.

    Raises:
        ValueError: a shard without a digest is broken.
    """
    if not path.exists():
        return ""
    digest, beside = digests.of_file(path), _digest_path(path)
    if known:
        expected = known.get(path.name)
    elif known is None and beside.is_file():
        expected = beside.read_text()
    else:
        # Shards appear whole: this one is older than digests, or a kill came before its own.
        count_records(path)
        expected = digest
    if digest == expected:
        return digest
    logging.warning("%s is damaged or was cut short: it is written again", path)
    return ""


def begin(directory: pathlib.Path, contents: Mapping[str, Any]) -> dict[str, str] | None:
    """Bind the directory to `contents`; called by every process.

    Args:
        directory: of the shards; it must exist.
        contents: JSON types that determine every shard; `kind` says what the records are.

    Returns:
        Digests of the shards by name, if it is complete already.

    Raises:
        ValueError: it holds something else.
        OSError: it cannot be written.
    """
    path = directory / SIDECAR_NAME
    if jax.process_index() == 0 and not path.exists():
        write_json(path, {**contents, "complete": False})
    multihost_utils.sync_global_devices("sidecar written")
    sidecar = _read_json(path)
    for name, value in json.loads(json.dumps(contents)).items():
        if sidecar.get(name) != value:
            raise ValueError(
                f"{directory} holds a cache with other {name}; use the same config to finish it, "
                "or another workdir"
            )
    if sidecar.get("complete") is not True:
        return None
    known = sidecar.get(DIGESTS, {})
    if not DIGESTS_KEY.fits(known):
        raise ValueError(f"{path} has {DIGESTS}={_short(known)}, expected {DIGESTS_KEY.expected}")
    return known


def finish(
    directory: pathlib.Path,
    contents: Mapping[str, Any],
    num_shards: Mapping[str, int],
    found: Mapping[str, str],
) -> dict[str, list[int]]:
    """Say that the shards of every split are there; called by every process after its own.

    Args:
        directory: of the shards.
        contents: see `begin`.
        num_shards: by split.
        found: digests of the shards of this process, by name.

    Returns:
        The number of records in each shard of each split, which the sidecar holds as `counts`.

    Raises:
        ValueError: a shard is missing or broken.
        OSError: the directory cannot be written.
    """
    multihost_utils.sync_global_devices("shards written")
    counts = {
        split: [count_records(shard_path(directory, split, i, number)) for i in range(number)]
        for split, number in num_shards.items()
    }
    everywhere: dict[str, str] = {}
    for text in distributed.gather_texts(json.dumps(dict(found))):
        everywhere |= json.loads(text)
    if jax.process_index() == 0:
        ending = {"counts": counts, DIGESTS: dict(sorted(everywhere.items())), "complete": True}
        write_json(directory / SIDECAR_NAME, {**contents, **ending})
        for path in directory.glob(_digest_path(pathlib.Path("*")).name):
            path.unlink()
    multihost_utils.sync_global_devices("sidecar complete")
    return counts


def read_sidecar(
    directory: str | os.PathLike, kind: str, keys: Mapping[str, Key]
) -> dict[str, Any]:
    """Read the contents of a complete directory of a kind.

    Args:
        directory: the directory.
        kind: of what it holds.
        keys: what has to be there beside `KEYS`.

    Raises:
        ValueError: it is missing, incomplete or of another kind, or a key is missing or wrong.
    """
    path = storage.to_path(directory) / SIDECAR_NAME
    sidecar = _read_json(path)
    if sidecar.get("kind") != kind:
        raise ValueError(f"{directory} holds {sidecar.get('kind')!r}, expected {kind!r}")
    if sidecar.get("complete") is not True:
        raise ValueError(
            f"{directory} was cut short while it was written: run the command that wrote it again"
        )
    for name, key in {**KEYS, **keys}.items():
        if name not in sidecar or not key.fits(sidecar[name]):
            found = f"has {name}={_short(sidecar[name])}" if name in sidecar else f"lacks {name}"
            raise ValueError(
                f"{path} {found}, expected {key.expected}: write the cache again with --mode=cache"
            )
    return sidecar


def open_shards(
    directory: str | os.PathLike, split: str, counts: Iterable[int]
) -> grain.sources.RandomAccessDataSource[bytes]:
    """Open the shards of a split for random access.

    Args:
        directory: of the shards.
        split: its name.
        counts: records of each shard.

    Raises:
        ValueError: a shard is missing, broken or of another length.
    """
    counts = list(counts)
    paths = [
        shard_path(pathlib.Path(directory), split, shard, len(counts))
        for shard in range(len(counts))
    ]
    for path, count in zip(paths, counts, strict=True):
        found = count_records(path)
        if found != count:
            raise ValueError(f"{path} has {found} records, expected {count}; write it again")
    names = [str(path) for path in paths]
    # Of its two bases, by platform, the empty one of Windows is the one that is seen.
    return grain.sources.ArrayRecordDataSource(names)  # pyright: ignore[reportReturnType]


def count_records(path: pathlib.Path) -> int:
    """Return the number of records in a shard.

    Raises:
        ValueError: it is missing or broken.
    """
    try:
        path.open("rb").close()
        reader = ArrayRecordReader(str(path))
        count = reader.num_records()
        reader.close()
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"cannot read {path}: {reason}; delete it and write it again") from error
    return count


def _read_json(path: storage.Path) -> dict[str, Any]:
    try:
        sidecar = parse_json(read_regular(path, MAX_JSON_BYTES))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path.parent} is not a complete cache ({SIDECAR_NAME}: {error}); write one with "
            "--mode=cache"
        ) from error
    if not isinstance(sidecar, dict):
        raise ValueError(f"{path} is not a JSON object; write it again with --mode=cache")
    return sidecar


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} ..."


class _Progress:
    """Logs each shard that is done, with the time that the others of all processes will take."""

    def __init__(self, num_shards: int):
        self._num_shards = math.ceil(num_shards / jax.process_count())
        self._done = 0
        self._start = time.monotonic()

    def step(self, path: pathlib.Path) -> None:
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
