"""What files are, by content: their fingerprint, cheap enough for a million of them.

    pictures    how many
    names       digest of the names, sizes and labels, in order
    contents    digest of the contents of `SAMPLE` of them, or of all if there are no more
    times       digest of the times of their last change

A file of the same name and size that was changed shows in `contents` if it is of the sample, else
in `times`, as a copy of the same files does.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from dar_jax.common.typing import Int
from dar_jax.data import mirror
from dar_jax.data.base import EncodedSource, Source
from dar_jax.data.decode import UnreadablePictureError
from dar_jax.data.folder import FolderSource
from dar_jax.data.latents import LatentFolder
from dar_jax.data.references import GroupSource
from dar_jax.data.tar import TarSource

SAMPLE = 512
KEYS = {
    "pictures": "number of pictures",
    "names": "list of names, sizes and labels of pictures",
    "contents": "content of pictures",
    "groups": "list of groups of references",
    "times": "list of times of files",
}
"""What a fingerprint may hold, in words."""
CHUNK = 10_000


class Stamp(NamedTuple):
    """Name, size in bytes and time of the last change in ns of a file."""

    name: str
    size: int
    time: int


def identify(source: Source, num_threads: int) -> dict[str, Any]:
    """Fingerprint of what is trained on, as JSON types: pictures, or groups of them."""
    if isinstance(source, GroupSource):
        content = np.asarray(source.groups, np.int64).tobytes()
        groups = hashlib.sha256(f"{source.groups.shape}".encode() + content).hexdigest()
        return {**identify(source.source, num_threads), "groups": groups}
    content = functools.partial(_content, source)
    labels = getattr(source, "labels", ())
    return fingerprint(_stamps(source), len(source), content, labels=labels, threads=num_threads)


def fingerprint(
    stamps: Iterable[Stamp],
    count: int,
    content: Callable[[int], bytes],
    *,
    labels: Sequence[int] | Int[np.ndarray, " N"] = (),
    threads: int,
) -> dict[str, Any]:
    """Fingerprint of files.

    Args:
        stamps: of all of them in order; none where they are no files.
        count: how many there are.
        content: of the file of an index.
        labels: by index, where they are known without reading.
        threads: readers.
    """
    names, times, contents = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    names.update(np.asarray(labels, np.int64).tobytes())
    lines, stamped = [], []
    for stamp in stamps:
        lines.append(f"{stamp.size} {stamp.name}\n")
        stamped.append(stamp.time)
        if len(lines) == CHUNK:
            _drain(names, times, lines, stamped)
    _drain(names, times, lines, stamped)
    chosen = np.unique(np.linspace(0, count - 1, min(count, SAMPLE), dtype=int)).tolist()
    with ThreadPoolExecutor(threads) as pool:
        for data in pool.map(content, chosen):
            contents.update(hashlib.sha256(data).digest())
    digests = {"names": names, "contents": contents, "times": times}
    return {"pictures": count, **{name: digest.hexdigest() for name, digest in digests.items()}}


def stamp_of(path: str, name: str) -> Stamp:
    """Return the stamp of a file; of one that is gone the name alone."""
    try:
        return Stamp(name, *mirror.status(path))
    except OSError:
        return Stamp(name, -1, 0)


def _drain(names: Any, times: Any, lines: list[str], stamped: list[int]) -> None:
    # Names of files may hold bytes that are no UTF-8.
    names.update("".join(lines).encode(errors="surrogateescape"))
    times.update(np.array(stamped, np.int64).tobytes())
    lines.clear()
    stamped.clear()


def _stamps(source: Source) -> Iterable[Stamp]:
    files = source.files if isinstance(source, LatentFolder) else source
    if isinstance(files, FolderSource):
        root = str(files.root)
        return (stamp_of(os.path.join(root, path), path) for path in files.paths)
    if isinstance(files, TarSource):
        tars = {path: stamp_of(path, "") for path in {m.path for m in files.members}}
        return (
            Stamp(f"{os.path.basename(m.path)}:{m.name}", m.size, tars[m.path].time)
            for m in files.members
        )
    return ()


def _content(source: Source, index: int) -> bytes:
    """The bytes of a picture's file and its label, or the arrays of an example."""
    try:
        if isinstance(source, EncodedSource):
            picture = source.read(index)
            return picture.label.to_bytes(8, "little") + picture.data
        example: Mapping[str, Any] = source[index]
        return b"".join(np.ascontiguousarray(example[name]).tobytes() for name in sorted(example))
    except UnreadablePictureError:
        return b""
