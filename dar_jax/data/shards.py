"""A directory of ArrayRecord shards with a JSON sidecar that says what they hold.

    dataset.json                            the contents, and whether all of it is there
    train-00000-of-00012.array_record
    test-00000-of-00001.array_record

Shards and sidecar appear whole or not at all. The sidecar is written first with `complete` false
and at the end with `complete` true: so a directory that was cut short is told apart from a whole
one, and the same command can finish it, but no other. `shard_writing` does that.

The sidecar has a digest of every shard, which the command that writes a directory checks. Whoever
reads records is told of damage by ArrayRecord's own hashes, and by a digest of both ends of a shard
that another one lies in its place.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import grain
from absl import logging
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from dar_jax.common import digests, storage
from dar_jax.common.files import parse_json, read_regular, replacing
from dar_jax.common.typing import Any
from dar_jax.data.base import MAX_JSON_BYTES, SPLITS

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
DIGESTS, ENDS, DIGEST = "digests", "ends", "digest"
"""Keys of a sidecar: digests of whole shards, of their ends, and of all else that it says."""
DIGESTS_KEY = Key(
    "digests by shard",
    lambda value: isinstance(value, dict) and all(map(TEXT.fits, value.values())),
)
END_BYTES = 2**12
MAX_SHOWN = 40
"""Characters of a wrong value that are shown."""
WRITER_OPTIONS = "group_size:1"
"""One record per chunk, which random access reads fastest."""


class Whole(NamedTuple):
    """What is known of a whole shard: digest of the file, and number of records."""

    digest: str
    count: int


def shard_path(directory: storage.Path, split: str, shard: int, num_shards: int) -> storage.Path:
    """Name the file of a shard."""
    return directory / f"{split}-{shard:05d}-of-{num_shards:05d}.array_record"


def write_shard(path: storage.Path, records: Iterable[bytes]) -> Whole:
    """Write a shard, whole or not at all.

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
        digest = digests.of_file(temporary)
    return Whole(digest, count)


@contextlib.contextmanager
def _errors_of_system(path: storage.Path) -> Iterator[None]:
    """Raise OSError for what the writer makes of one."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"cannot write {path}: {str(error).partition(';')[0]}") from error


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
    sidecar = read_json(path)
    if sidecar.get("kind") != kind:
        raise ValueError(f"{directory} holds {sidecar.get('kind')!r}, expected {kind!r}")
    if sidecar.get("complete") is not True:
        raise ValueError(
            f"{directory} was cut short while it was written: run the command that wrote it again"
        )
    for name, key in {**KEYS, **keys}.items():
        if name not in sidecar or not key.fits(sidecar[name]):
            found = f"has {name}={short(sidecar[name])}" if name in sidecar else f"lacks {name}"
            raise ValueError(
                f"{path} {found}, expected {key.expected}: write the cache again with --mode=cache"
            )
    if not DIGESTS_KEY.fits(sidecar.get(ENDS, {})):
        found = short(sidecar[ENDS])
        raise ValueError(f"{path} has {ENDS}={found}, expected {DIGESTS_KEY.expected}")
    if sidecar.get(DIGEST) not in (None, digest_of(sidecar)):
        logging.warning("%s has changed since it was written; it is taken as it is", path)
    return sidecar


def digest_of(sidecar: Mapping[str, Any]) -> str:
    """Digest of what a sidecar says."""
    return digests.of_json({name: value for name, value in sidecar.items() if name != DIGEST})


def open_shards(
    directory: str | os.PathLike,
    split: str,
    counts: Iterable[int],
    ends: Mapping[str, str] = types.MappingProxyType({}),
) -> grain.sources.RandomAccessDataSource[bytes]:
    """Open the shards of a split for random access.

    Args:
        directory: of the shards.
        split: its name.
        counts: records of each shard.
        ends: digests of the ends of those that are known, by name, see `digest_of_ends`.

    Raises:
        ValueError: a shard is missing, broken, of another length, or another one.
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
        if ends.get(path.name) not in (None, digest_of_ends(path)):
            raise ValueError(
                f"{path} is not the shard that was written under this name: bring that one back, "
                "or run the command that wrote the cache again"
            )
    names = [str(path) for path in paths]
    # Of its two bases, by platform, the empty one of Windows is the one that is seen.
    return grain.sources.ArrayRecordDataSource(names)  # pyright: ignore[reportReturnType]


def count_records(path: storage.Path) -> int:
    """Return the number of records in a shard; one in a bucket is copied for that.

    Raises:
        ValueError: it is missing or broken.
    """
    try:
        with storage.as_local(path) as local:
            local.open("rb").close()
            reader = ArrayRecordReader(str(local))
            count = reader.num_records()
            reader.close()
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"cannot read {path}: {reason}; delete it and write it again") from error
    return count


def digest_of_ends(path: storage.Path) -> str:
    """Digest of the first and the last bytes of a shard, which tell it from others."""
    with storage.open_binary(path) as file:
        ends = file.read(END_BYTES)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - END_BYTES))
        ends += file.read()
    return hashlib.sha256(ends).hexdigest()


def read_json(path: storage.Path) -> dict[str, Any]:
    """Read a sidecar, whatever it says.

    Raises:
        ValueError: it cannot be read, or is no JSON object.
    """
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


def short(value: Any) -> str:
    """A value as JSON, of which a long one is shown in part."""
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} ..."
