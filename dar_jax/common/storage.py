"""Where runs, models and sets are kept: local folders, and buckets of Google Cloud or Amazon S3.

    runs/first          pathlib.Path, as everywhere
    gs://bucket/first   epath.Path, which has the same methods (etils; gcsfs does the work)
    s3://bucket/first   the same (s3fs)

A bucket has no folders, rename, append or locks. So there an object is written once, under its
final name, and is whole as soon as it is seen; what is several objects has one that is written
last; a file that grows is written anew with each line; and only one can create a claim.
Requests that fail are tried again, for minutes; credentials are those of `gcloud auth
application-default login` or of the machine, and those of AWS's environment (`AWS_PROFILE`,
`AWS_ENDPOINT_URL`). Orbax cannot write checkpoints to s3://: `training.staged_checkpoints` does.

Data are read through a local copy (`data.mirror`). Local only is what libraries open by its local
path: folders of pictures to compare with, single pictures, official checkpoints, config files,
compiled programs, and what comes with the package.
"""

import contextlib
import functools
import importlib
import io
import os
import pathlib
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

from etils import epath

from dar_jax.common.addresses import SERVICES, check_path, scheme_of, service_of

Path = pathlib.Path | epath.Path

NUM_THREADS = 8
"""Files that are copied at the same time."""
CHUNK_BYTES = 2**24
NUM_TRIES = 5


def to_path(path: str | os.PathLike, name: str = "path") -> Path:
    """Return a local path, or one in a bucket.

    Raises:
        ValueError: see `check_path`.
    """
    check_path(path, name, known=tuple(SERVICES))
    if scheme_of(path) in SERVICES:
        _connect(path)
        return epath.Path(os.fspath(path))
    return pathlib.Path(path)


def is_remote(path: str | os.PathLike) -> bool:
    """Tell whether a path is in a bucket."""
    return isinstance(path, epath.Path)


def _connect(path: str | os.PathLike) -> Any:
    """The file system of all buckets of a service, the one that `epath` uses, too."""
    return _connected(scheme_of(path))


@functools.cache
def _connected(scheme: str) -> Any:
    import fsspec
    from etils.epath import backend

    os.environ.setdefault("EPATH_USE_TF", "false")  # else epath prefers TensorFlow, where it is
    client = importlib.import_module(f"dar_jax.common.{SERVICES[scheme].client}").Buckets
    for name in client.protocol:
        fsspec.register_implementation(name, client, clobber=True)
    return backend.fsspec_backend.fs(f"{scheme}://")


@contextlib.contextmanager
def _briefly(system: Any) -> Iterator[None]:
    """Let requests fail soon: at the beginning nothing is lost."""
    system.patience = system.brief
    try:
        yield
    finally:
        del system.patience


def check_writable(path: Path) -> None:
    """Make sure that a bucket is there and can be written.

    Raises:
        ValueError: it is not, or the path is that of an object.
    """
    # One name a host: what a kill leaves goes with the next look, and a bucket takes but one write
    # a second of one object.
    token, system = path / f".writable-{socket.gethostname()}", _connect(path)
    try:
        with _briefly(system):
            is_file = path.is_file()
            if not is_file:
                system.pipe_file(str(token), b"")
                if system.may_ignore_conditions:
                    _check_conditions(token)
                token.unlink(missing_ok=True)  # others look at the same time
    except (OSError, ValueError) as error:
        is_missing = isinstance(error, FileNotFoundError)
        reason = "there is no such bucket" if is_missing else " ".join(str(error).split())
        raise ValueError(
            f"cannot use {path}: {reason}; check the bucket's name and your rights to write "
            f"objects, and {service_of(path).login}"
        ) from error
    if is_file:
        raise ValueError(f"cannot use {path}: it is an object, no folder; choose another")


def _check_conditions(token: Path) -> None:
    """Raise OSError if what is there can be created once more."""
    # Others delete it at times, but not every time.
    if all(create(token, "") for _ in range(NUM_TRIES)):
        raise OSError(
            f"it ignores If-None-Match and creates {token.name} twice; use another service"
        )


def make_directory(path: Path) -> None:
    """Make a folder and those above it; a bucket has none."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def create(path: Path, text: str) -> bool:
    """Write a file that is not there yet; False if there is one. Only one of several can."""
    try:
        if is_remote(path):
            _connect(path).pipe_file(str(path), text.encode(), mode="create")
        else:
            with open(path, "x") as file:
                file.write(text)
    except FileExistsError:
        return False
    return True


def append(path: Path, data: bytes) -> None:
    """Add to the end of a file; in a bucket it is written anew, and has one writer."""
    if is_remote(path):
        old = path.read_bytes() if path.exists() else b""
        path.write_bytes(old + data)
        return
    with path.open("ab") as file:
        file.write(data)


def open_binary(path: str | os.PathLike) -> io.BufferedReader:
    """Open a file to read."""
    path = to_path(path)
    if not is_remote(path):
        return open(path, "rb")
    return io.BufferedReader(cast(Any, path.open("rb")))


def status(path: Path) -> tuple[int, int]:
    """Size, and time of the last change in ns, of a file.

    Raises:
        OSError: there is none.
    """
    if is_remote(path):
        system = _connect(path)
        about = system.info(str(path))
        return about["size"], round(system.changed(about) * 10**9)
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def upload(source: pathlib.Path, target: Path) -> None:
    """Copy a file to a bucket; until it is complete, what was there before stays."""
    _connect(target).put_file(str(source), str(target))


def upload_tree(source: pathlib.Path, target: Path, *, last: str = "") -> None:
    """Copy a folder to a bucket.

    Args:
        source: a local folder.
        target: of what is in it.
        last: name of the file that says that all are there; the old one goes first.
    """
    if last:
        (target / last).unlink(missing_ok=True)
    names = [p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(pool.map(lambda n: upload(source / n, target / n), [n for n in names if n != last]))
    if last:
        upload(source / last, target / last)


def download(source: Path, names: list[str], target: pathlib.Path) -> None:
    """Copy files of a folder in a bucket to a local folder, under the same names."""

    def copy(name: str) -> None:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with open_binary(source / name) as file, open(target / name, "wb") as copied:
            shutil.copyfileobj(file, copied, CHUNK_BYTES)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(pool.map(copy, names))


@contextlib.contextmanager
def as_local(path: Path) -> Iterator[pathlib.Path]:
    """Give a local file, for a while: a copy of one in a bucket."""
    if isinstance(path, pathlib.Path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        download(path.parent, [path.name], pathlib.Path(folder))
        yield pathlib.Path(folder, path.name)


class Copies:
    """A folder for libraries that write to local files only: of a bucket, copied there."""

    def __init__(self, target: Path):
        """Use `target` itself if it is local."""
        self._target = target
        self._folder = tempfile.TemporaryDirectory() if is_remote(target) else None
        self.local = pathlib.Path(self._folder.name if self._folder else target)
        self._sent: dict[pathlib.Path, int] = {}
        self._time = time.monotonic()

    def send(self, *, at_most_every: float = 0.0) -> None:
        """Copy what has grown, unless that was done less than so many seconds ago."""
        if self._folder is None or time.monotonic() - self._time < at_most_every:
            return
        for path in filter(pathlib.Path.is_file, self.local.rglob("*")):
            size = path.stat().st_size
            if self._sent.get(path) != size:
                upload(path, self._target / path.relative_to(self.local).as_posix())
                self._sent[path] = size
        self._time = time.monotonic()


def entries(directory: Path) -> list[Path]:
    """What a folder holds; nothing if there is none."""
    try:
        return [*directory.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def objects(addresses: Sequence[str]) -> list[dict[str, tuple[int, int]]]:
    """Objects at each address and below: address -> size, and milliseconds since 1970.

    Raises:
        OSError: they cannot be listed.
    """

    def listed(address: str) -> dict[str, tuple[int, int]]:
        system = _connect(address)
        found = system.find(address, detail=True)
        return {
            f"{scheme_of(address)}://{name}": (
                about["size"],
                round(system.changed(about) * 1000),
            )
            for name, about in found.items()
        }

    with contextlib.ExitStack() as stack:
        for system in {id(each): each for each in map(_connect, addresses)}.values():
            stack.enter_context(_briefly(system))
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            return list(pool.map(listed, addresses))


def download_object(address: str, size: int, target: pathlib.Path) -> None:
    """Copy an object of that many bytes to a local file.

    Raises:
        OSError: it cannot be read, or has another size.
    """
    with open(target, "wb") as file:
        for start in range(0, size, CHUNK_BYTES):
            end = min(start + CHUNK_BYTES, size)
            file.write(_connect(address).cat_file(address, start=start, end=end))
        found = file.tell()
    if found != size:
        raise OSError(f"{found:,} bytes, not {size:,}: it was changed, or cut short")


def files_below(directory: Path) -> list[Path]:
    """All files of a folder and of those in it, in the order of their paths."""
    if not is_remote(directory):
        return sorted(path for path in directory.rglob("*") if path.is_file())
    found = _connect(directory).find(str(directory))
    names = [name for name in sorted(found) if not name.endswith("/")]  # marks of folders
    return [epath.Path(f"{scheme_of(directory)}://{name}") for name in names]


def copy_tree(source: Path, target: Path) -> None:
    """Copy a folder of a bucket to another one there, without reading it here."""
    names = [path.relative_to(source).as_posix() for path in files_below(source)]
    copy = _connect(source).cp_file
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(pool.map(lambda name: copy(str(source / name), str(target / name)), names))


def delete_tree(directory: Path) -> None:
    """Delete a folder and all in it."""
    if is_remote(directory):
        cast(epath.Path, directory).rmtree(missing_ok=True)
    else:
        shutil.rmtree(directory)
