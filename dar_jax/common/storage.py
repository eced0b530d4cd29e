"""Where runs, models and sets are kept: local folders, and buckets of Google Cloud Storage.

    runs/first          pathlib.Path, as everywhere
    gs://bucket/first   epath.Path, which has the same methods (etils; gcsfs does the work)

A bucket has no folders, rename, append or locks. So there an object is written once, under its
final name, and is whole as soon as it is seen; what is several objects has one that is written
last; a file that grows is written anew with each line; and only one can create a claim.
Requests that fail are tried again, for minutes; credentials are those of `gcloud auth
application-default login` or of the machine. Of s3:// Orbax cannot write checkpoints: mount it.

Data are read through a local copy (`data.mirror`). Local only is what libraries open by its local
path: folders of pictures to compare with, single pictures, official checkpoints, config files,
compiled programs, and what comes with the package.
"""

import contextlib
import functools
import importlib.util
import io
import os
import pathlib
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

from etils import epath

Path = pathlib.Path | epath.Path

BUCKETS = ("gs",)
"""Schemes of buckets that are read and written."""
ELSEWHERE = ("hf", "package")
"""Schemes of addresses that others read: `common.hub` and `common.model_dir`."""
MODEL_KEYS = (
    *("tokenizer", "vae", "train.init_from", "sample.model", "sample.untrained_model"),
    *("benchmark.model", "evaluate.weights", "loss.dinov2", "loss.lpips"),
)
"""Keys of a configuration that name a model directory."""
FILE_KEYS = ("data.classes", "data.references", "evaluate.reference", "evaluate.images")
"""Keys of a configuration that name a file."""
DATA_KEY = "data.path"
"""Key of the data, which are read through a local copy (`data.mirror`)."""
MOUNTS = {"gs": "gcsfuse BUCKET DIR", "s3": "mount-s3 BUCKET DIR"}
"""Commands that show a bucket as a folder."""
NUM_THREADS = 8
"""Files that are copied at the same time."""
CHUNK_BYTES = 2**24
_ADDRESS = re.compile(r"(?:^|,)\s*(([A-Za-z][A-Za-z0-9+.-]*):/+[^,]*)")
_IN_BUCKET = re.compile(r"[a-z0-9]+://[a-z0-9][\w.-]+(/|$)")


def check_path(path: str | os.PathLike, name: str, *, known: tuple[str, ...] = ()) -> None:
    """Refuse an address that would be taken for a local path.

    Args:
        path: a path or address, or several, joined by commas.
        name: what it is, as on the command line.
        known: schemes that are read here.

    Raises:
        ValueError: it has another scheme, names no bucket, or needs what is not installed.
    """
    for address, scheme in _ADDRESS.findall(os.fspath(path)):
        if scheme not in known:
            raise ValueError(f"{name}={address}: {_advice(scheme.lower())}")
        if scheme in BUCKETS and not _IN_BUCKET.match(address):
            raise ValueError(f"{name}={address}: expected {scheme}://BUCKET/DIR")
        if scheme in BUCKETS and importlib.util.find_spec("gcsfs") is None:
            raise ValueError(
                f"{name}={address} needs gcsfs, which is not installed; run pip install "
                "'dar-jax[gcs]'"
            )


def _advice(scheme: str) -> str:
    if scheme in MOUNTS:
        return (
            f"no {scheme}:// here: mount the bucket ({MOUNTS[scheme]}) and give the path below DIR"
        )
    if scheme == "file":
        return "give the path alone, without file://"
    return f"{scheme}:// is not known; give the path of a local or mounted folder"


def check_config(values: Mapping[str, Any], prefix: str) -> None:
    """Refuse addresses in a configuration that are not read.

    Args:
        values: nested, with JSON types and tuples as leaves.
        prefix: of their names on the command line.

    Raises:
        ValueError: see `check_path`.
    """
    models = [f"{prefix}.{key}" for key in MODEL_KEYS]
    convert = values.get("convert")
    if isinstance(convert, Mapping) and convert.get("to") == "torch":
        models.append(f"{prefix}.convert.source")
    readable = (*models, *(f"{prefix}.{key}" for key in (*FILE_KEYS, DATA_KEY)))
    for name, text in _texts(values, prefix):
        known = (*ELSEWHERE, *BUCKETS) if name in readable else ELSEWHERE
        check_path(text, f"--{name}", known=known)


def _texts(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, name)


def to_path(path: str | os.PathLike, name: str = "path") -> Path:
    """Return a local path, or one in a bucket.

    Raises:
        ValueError: see `check_path`.
    """
    check_path(path, name, known=BUCKETS)
    if os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in BUCKETS)):
        _connect()
        return epath.Path(os.fspath(path))
    return pathlib.Path(path)


def is_remote(path: str | os.PathLike) -> bool:
    """Tell whether a path is in a bucket."""
    return isinstance(path, epath.Path)


@functools.cache
def _connect() -> Any:
    """The file system of all buckets, the one that Orbax uses through `epath`, too."""
    import fsspec
    from etils.epath import backend

    from dar_jax.common.patient_buckets import PatientBuckets

    os.environ.setdefault("EPATH_USE_TF", "false")  # else epath prefers TensorFlow, where it is
    for name in PatientBuckets.protocol:
        fsspec.register_implementation(name, PatientBuckets, clobber=True)
    return backend.fsspec_backend.fs("gs://")


def check_writable(path: Path) -> None:
    """Make sure that a bucket is there and can be written.

    Raises:
        ValueError: it is not, or the path is that of an object.
    """
    # One name a host: what a kill leaves goes with the next look, and a bucket takes but one write
    # a second of one object.
    token, system = path / f".writable-{socket.gethostname()}", _connect()
    system.patience = 0.0  # at the beginning nothing is lost
    try:
        is_file = path.is_file()
        if not is_file:
            system.pipe_file(str(token), b"")
            token.unlink(missing_ok=True)  # others look at the same time
    except (OSError, ValueError) as error:
        is_missing = isinstance(error, FileNotFoundError)
        reason = "there is no such bucket" if is_missing else " ".join(str(error).split())
        raise ValueError(
            f"cannot use {path}: {reason}; check the bucket's name and your rights to write "
            "objects, and run gcloud auth application-default login"
        ) from error
    finally:
        del system.patience
    if is_file:
        raise ValueError(f"cannot use {path}: it is an object, no folder; choose another")


def make_directory(path: Path) -> None:
    """Make a folder and those above it; a bucket has none."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def create(path: Path, text: str) -> bool:
    """Write a file that is not there yet; False if there is one. Only one of several can."""
    try:
        if is_remote(path):
            _connect().pipe_file(str(path), text.encode(), mode="create")
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
        about = _connect().info(str(path))
        return about["size"], round(about["mtime"].timestamp() * 10**9)
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def upload(source: pathlib.Path, target: Path) -> None:
    """Copy a file to a bucket; until it is complete, what was there before stays."""
    _connect().put_file(str(source), str(target))


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
        found = system.find(address, detail=True)
        scheme = address.partition("//")[0]
        return {
            f"{scheme}//{name}": (about["size"], round(about["mtime"].timestamp() * 1000))
            for name, about in found.items()
        }

    system = _connect()
    system.patience = 0.0  # at the beginning nothing is lost
    try:
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            return list(pool.map(listed, addresses))
    finally:
        del system.patience


def download_object(address: str, size: int, target: pathlib.Path) -> None:
    """Copy an object of that many bytes to a local file.

    Raises:
        OSError: it cannot be read, or has another size.
    """
    with open(target, "wb") as file:
        for start in range(0, size, CHUNK_BYTES):
            end = min(start + CHUNK_BYTES, size)
            file.write(_connect().cat_file(address, start=start, end=end))
        found = file.tell()
    if found != size:
        raise OSError(f"{found:,} bytes, not {size:,}: it was changed, or cut short")


def files_below(directory: Path) -> list[Path]:
    """All files of a folder and of those in it, in the order of their paths."""
    if not is_remote(directory):
        return sorted(path for path in directory.rglob("*") if path.is_file())
    found = _connect().find(str(directory))
    scheme = str(directory).partition("//")[0]
    return [epath.Path(f"{scheme}//{name}") for name in sorted(found)]


def delete_tree(directory: Path) -> None:
    """Delete a folder and all in it."""
    if is_remote(directory):
        cast(epath.Path, directory).rmtree(missing_ok=True)
    else:
        shutil.rmtree(directory)
