"""Files that appear whole or not at all, and files that are read only if they are files."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import socket
import stat
import tempfile
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from dar_jax.common import storage

ARCHIVE_ERRORS = (
    *(OSError, ValueError, TypeError, AttributeError, KeyError, EOFError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, SyntaxError, MemoryError),
)
"""What reading a damaged `.npz` raises."""
SYSTEM = ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid")
"""A file and a link whose contents tell one boot of Linux, and one container in it, from others."""


@functools.cache
def host() -> str:
    """Name this machine, or the container on it that this process sees: many share their name."""
    file, link = SYSTEM
    try:
        system = pathlib.Path(file).read_text() + os.readlink(link)
    except OSError:  # no Linux
        system = f"{uuid.getnode():x}"
    return f"{socket.gethostname()}-{hashlib.sha256(system.encode()).hexdigest()[:8]}"


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Give a sibling to write to, with the same suffix, which takes the place of `path` at the end.

    A failure or a kill leaves `path` as it was. For a bucket it is a local file, which is copied.
    """
    path = storage.to_path(path)
    if not isinstance(path, pathlib.Path):
        with tempfile.TemporaryDirectory() as folder:
            yield pathlib.Path(folder, path.name)
            storage.upload(pathlib.Path(folder, path.name), path)
        return
    temporary = temporary_path(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and error.filename is None:  # as of a full disk
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def temporary_path(path: pathlib.Path) -> pathlib.Path:
    """Name a sibling to write to, after this process, so that `sweep` finds it after a kill."""
    owner = f"{host()}-{os.getpid()}-{uuid.uuid4().hex}"
    return path.with_name(f".{path.stem}-{owner}{path.suffix}")


def sweep(directory: pathlib.Path) -> None:
    """Delete what killed processes of this host were writing in a directory, and below."""
    own = re.compile(rf"\..*-{re.escape(host())}-(\d+)-[0-9a-f]{{32}}(\.\w+)?")
    for folder, folders, names in os.walk(directory):
        for name in [*folders, *names]:
            if (match := own.fullmatch(name)) and not is_alive(int(match[1])):
                path = pathlib.Path(folder, name)
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                if name in folders:
                    folders.remove(name)


def is_alive(process: int) -> bool:
    """Tell whether there is a process of this number on this host."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def read_regular(path: str | os.PathLike, max_bytes: int) -> bytes:
    """Read a regular file, or one that a link leads to: no pipe is waited for, no device emptied.

    Raises:
        OSError: it cannot be read, is something else, or has more bytes.
    """
    if storage.is_remote(path):
        with storage.open_binary(path) as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise OSError(errno.EFBIG, f"more than {max_bytes:,} bytes", str(path))
        return content

    def opener(name: str, flags: int) -> int:
        # Opening a pipe that nobody writes to would wait.
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    with open(path, "rb", opener=opener) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "no regular file", str(path))
        if status.st_size > max_bytes:
            reason = f"{status.st_size:,} bytes, more than {max_bytes:,}"
            raise OSError(errno.EFBIG, reason, str(path))
        return file.read()


def parse_json(text: bytes | str) -> Any:
    """Read JSON.

    Raises:
        ValueError: it is none, or nested too deep.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def write_json(path: str | os.PathLike, values: Mapping[str, Any]) -> None:
    """Write values of JSON types, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def write_npz(
    path: str | os.PathLike, arrays: Mapping[str, np.ndarray], *, comment: str = ""
) -> None:
    """Write arrays by name, and a comment on the archive, whole or not at all."""
    with replacing(path) as temporary:
        # Any name but `allow_pickle` is an array's, which NumPy's types cannot say.
        np.savez(temporary, **arrays)  # pyright: ignore[reportArgumentType]
        if comment:
            with zipfile.ZipFile(temporary, "a") as archive:
                archive.comment = comment.encode()


def write_safetensors(
    path: storage.Path,
    arrays: Mapping[str, np.ndarray],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write arrays by name, whole or not at all, readable for those who can read other new files.

    The library's own files are for their owner alone.
    """
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            safetensors.numpy.save_file(contiguous, temporary, metadata)
        except safetensors.SafetensorError as error:  # what it makes of an error of the system
            raise OSError(f"cannot write {path}: {error}") from error
        temporary.chmod(mode)
