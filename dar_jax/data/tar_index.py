"""What is in a tar, from its headers: where its pictures and the files with their labels lie.

A picture is one read at its offset, so a tar is used as it is. One that is compressed is unpacked
in memory, by every process for itself; all of them together may have `MAX_UNPACKED` bytes.

Hard and symbolic links in a tar stand for the file that they lead to, under their own name. A tar
that ends without the mark of its end is used with a warning; one that is damaged, cut short or has
more behind its end is refused: pictures would be lost.
"""

import bz2
import dataclasses
import functools
import gzip
import io
import lzma
import pathlib
import posixpath
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from absl import logging

from dar_jax.data.decode import MAX_FILE_BYTES, picture_suffixes
from dar_jax.data.listing import HIDDEN, Leaving, Seen
from dar_jax.data.names import is_hidden, printable

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
LABEL_SUFFIXES = (".cls", ".json", ".txt")
"""Files that say the class of the picture of the same name, the first that does being taken."""
OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
"""Kinds of compressed files, by their first bytes."""
ZSTANDARD = b"\x28\xb5\x2f\xfd"
MAX_UNPACKED = 2**32
CHUNK = 2**24
MAX_LINKS = 32
"""Links that lead to one another; more are a circle."""
DAMAGE = (
    *(tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError),
    *(ValueError, OverflowError, MemoryError, RecursionError),
)
"""What reading a broken tar raises."""


class Member(NamedTuple):
    """A file in a tar.

    Attributes:
        path: the tar.
        name: of the member, without `./` before it.
        offset: of its first byte in the tar, which is unpacked if it is compressed.
        size: in bytes.
    """

    path: str
    name: str
    offset: int
    size: int

    def read(self, tar: io.BufferedIOBase) -> bytes:
        """Return the content, from the open tar.

        Raises:
            OSError: it cannot be read, or is too large for a picture.
        """
        if self.size > MAX_FILE_BYTES:
            raise OSError(f"{self.size:,} bytes, more than {MAX_FILE_BYTES:,}")
        tar.seek(self.offset)
        return tar.read(self.size)


@dataclasses.dataclass(frozen=True, eq=False)
class TarIndex:
    """What a tar holds.

    Attributes:
        pictures: in the order of the tar.
        labels: files of `LABEL_SUFFIXES` by name, with the suffix in lower case.
        seen: what else there is.
    """

    pictures: tuple[Member, ...]
    labels: Mapping[str, Member]
    seen: Seen


@functools.cache
def index_tar(path: pathlib.Path) -> TarIndex:
    """Read the headers of a tar.

    Raises:
        ValueError: it is not a tar, cut short, damaged or too large to unpack, or has two files of
            one name.
    """
    logging.info("Reading the headers of %s", path)
    remarks = []
    try:
        with open_tar(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            infos = list(_headers(tar))
            if not _has_end(file, tar.offset):
                remarks.append(f"{path.name} has no mark of its end: it may be cut short")
    except DAMAGE as error:
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{path} is not a tar that pictures can be read from ({reason}): it must be complete"
        ) from error
    leaving = Leaving()
    pictures: dict[str, Member] = {}
    labels: dict[str, Member] = {}
    suffixes = picture_suffixes()
    for member in _members(path, infos, leaving):
        stem, suffix = posixpath.splitext(member.name)
        suffix = suffix.lower()
        if suffix in suffixes:
            _add(pictures, member.name, member)
        elif suffix in LABEL_SUFFIXES:
            _add(labels, stem + suffix, member)
        else:
            leaving.add_suffix(member.name)
    seen = Seen(len(infos), leaving.result(), tuple(remarks))
    return TarIndex(tuple(pictures.values()), labels, seen)


def open_tar(path: str | pathlib.Path) -> io.BufferedIOBase:
    """Open a tar, unpacked if it is compressed.

    Raises:
        OSError: it cannot be read.
        ValueError: it is compressed and cannot be unpacked.
    """
    if str(path) in _unpacked:
        return io.BytesIO(_unpacked[str(path)])
    file = open(path, "rb")  # noqa: SIM115 - for the caller
    start = file.read(len(max(OPENERS, key=len)))
    file.seek(0)
    if start.startswith(ZSTANDARD):
        file.close()
        raise ValueError("compressed with zstd; unpack it once: zstd -d")
    for mark, unpack in OPENERS.items():
        if start.startswith(mark):
            file.close()
            return io.BytesIO(_unpack(str(path), unpack))
    return file


_unpacked: dict[str, bytes] = {}
_unpacking = threading.Lock()


def _unpack(path: str, unpack: Callable[[str, str], io.BufferedIOBase]) -> bytes:
    """Unpack a file in memory, once in a process."""
    with _unpacking:
        if path not in _unpacked:
            logging.info("Unpacking %s in memory", path)
            room = MAX_UNPACKED - sum(len(content) for content in _unpacked.values())
            chunks, size = [], 0
            with unpack(path, "rb") as file:
                while chunk := file.read(CHUNK):
                    chunks.append(chunk)
                    size += len(chunk)
                    if size > room:
                        raise ValueError(
                            f"unpacked, the compressed tars have more than {MAX_UNPACKED:,} bytes: "
                            "decompress the files once, e.g. with gunzip"
                        )
            _unpacked[path] = b"".join(chunks)  # bytes are read without a copy
        return _unpacked[path]


def _headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    offset = -1
    for info in tar:
        if info.size < 0 or info.offset <= offset:
            raise tarfile.ReadError(f"a header at byte {info.offset} is damaged")
        offset = info.offset
        if not info.isdir():
            yield info


def _has_end(file: io.BufferedIOBase, offset: int) -> bool:
    """Tell whether the mark of the end, a block of zeros, is where the last member ends.

    Raises:
        ValueError: there is something else, or more behind it.
    """
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if not block:
        return False
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise ValueError(f"the header at byte {offset:,} is damaged")
    while chunk := file.read(CHUNK):
        if chunk.count(0) < len(chunk):
            raise ValueError("it goes on behind its end: are these two tars in one file?")
    return True


def _members(
    path: pathlib.Path, infos: list[tarfile.TarInfo], leaving: Leaving
) -> Iterator[Member]:
    """Yield the files, with links in place of what they lead to."""
    names = [_normal(info.name) for info in infos]
    places = dict(zip(names, infos, strict=True))
    for name, info in zip(names, infos, strict=True):
        if any(map(is_hidden, name.split("/"))):
            leaving.add(HIDDEN, name)
            continue
        target = _follow(name, info, places)
        if target is None:
            leaving.add("link that leads to no file in the tar", name)
        elif not target.isreg():
            leaving.add("neither a file nor a link to one", name)
        elif target.issparse():
            leaving.add("stored with holes", name)
        else:
            yield Member(str(path), name, target.offset_data, target.size)


def _follow(
    name: str, info: tarfile.TarInfo, places: Mapping[str, tarfile.TarInfo]
) -> tarfile.TarInfo | None:
    for _ in range(MAX_LINKS):
        if info.islnk():
            name = _normal(info.linkname)
        elif info.issym():
            name = _normal(posixpath.join(posixpath.dirname(name), info.linkname))
        else:
            return info
        if name not in places:
            return None
        info = places[name]
    return None


def _normal(name: str) -> str:
    """Return a path in a tar as one below where it would be unpacked."""
    return posixpath.normpath("/" + name).lstrip("/")


def _add(members: dict[str, Member], name: str, member: Member) -> None:
    if name in members:
        raise ValueError(
            f"{member.path} has two files that are both called {printable(name)!r}: only one could "
            "be read; rename one, or pack the tar again"
        )
    members[name] = member
