"""Data in a bucket: a local copy, made as far and as soon as it is read.

    data.cache_dir/gs/BUCKET/DIR/set-000000.tar
    data.cache_dir/gs/BUCKET/DIR/ant/1.jpg -> gs://BUCKET/DIR/ant/1.jpg#1234      (or s3)

What libraries open by its local path, tars and shards, is copied when a run begins, which reads all
their headers. Of pictures in folders there may be a million: each is a link with its address and
size until it is first read. Files have the times of their objects; one whose size or time is
another than in the bucket is copied again, one that is gone there goes. The copy of a directory may
be shared by the processes of a host.
"""

import dataclasses
import fcntl
import functools
import os
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from absl import logging

from dar_jax.common import storage
from dar_jax.common.addresses import SERVICES, scheme_of, service_of
from dar_jax.common.files import replacing, sweep
from dar_jax.data import tfds
from dar_jax.data.base import DataConfig
from dar_jax.data.braces import expand
from dar_jax.data.decode import picture_suffixes

NUM_THREADS = 16
"""Files that are copied at the same time."""
REPORT_SECONDS = 10.0
"""Between two lines of progress."""
READ_LATER = {"folder": picture_suffixes, "latent_folder": lambda: (".npz",)}
"""By source, suffixes of the files that are not copied before they are read."""


class State(NamedTuple):
    """What tells one version of a file from another: bytes, and milliseconds since 1970."""

    size: int
    time: int

    @property
    def times(self) -> tuple[int, int]:
        """Of the last access and change, in ns."""
        return self.time * 10**6, self.time * 10**6


def local(config: DataConfig) -> DataConfig:
    """Return a config whose path is local: that of the copy, where it is in a bucket.

    Raises:
        ValueError: there is nothing, it cannot be read, or has no room in `config.cache_dir`.
    """
    if not storage.is_remote(storage.to_path(config.path, "data.path")):
        return config
    names = expand(config.path) if config.source == "tar" else [config.path]
    if config.source.startswith(tfds.PREFIX):  # of many data sets beside each other one
        names = [f"{config.path}/{config.source.removeprefix(tfds.PREFIX).partition(':')[0]}"]
    later = READ_LATER.get(config.source, tuple)()
    _copy(tuple(name.rstrip("/") for name in names), config.cache_dir, later)
    return dataclasses.replace(config, path=str(_path_of(config.cache_dir, config.path)))


def fetch(path: pathlib.Path) -> pathlib.Path:
    """Return the path of a file, which is copied first where it is a link into a bucket.

    Raises:
        FileNotFoundError: it is gone from the bucket.
        ValueError: it changed there, or cannot be read or written.
    """
    address = _address(path)
    if address:
        try:
            _fetch(path, address, _state(path))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ValueError(
                f"cannot copy {address} to {path}: {error}; the same command goes on from there"
            ) from error
    return path


def status(path: str | os.PathLike) -> tuple[int, int]:
    """Size and time of the last change in ns of a file, of one that is in a bucket still, too.

    Raises:
        OSError: there is none.
    """
    if _address(path):
        state = _state(path)
        return state.size, state.times[1]
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def _address(path: str | os.PathLike) -> str:
    """Where a file that is not here yet is to be copied from, else ""."""
    try:
        target = os.readlink(path)
    except OSError:
        return ""
    return target.rpartition("#")[0] if scheme_of(target) in SERVICES else ""


def _state(path: str | os.PathLike) -> State:
    found = os.lstat(path)
    size = int(os.readlink(path).rpartition("#")[2]) if _address(path) else found.st_size
    return State(size, found.st_mtime_ns // 10**6)


def _path_of(cache_dir: str, address: str) -> pathlib.Path:
    return pathlib.Path(cache_dir).expanduser().absolute() / address.replace("://", "/", 1)


@functools.cache  # the splits of a run are of one listing
def _copy(addresses: tuple[str, ...], cache_dir: str, later: tuple[str, ...]) -> None:
    """Bring the copy of addresses to what there is in the bucket now."""
    try:
        found = storage.objects(addresses)
    except OSError as error:
        is_missing = isinstance(error, FileNotFoundError)
        reason = "there is no such bucket" if is_missing else " ".join(str(error).split())
        raise ValueError(
            f"cannot read data.path={addresses[0]}: {reason}; check its name and your rights to "
            f"list and read objects, and {service_of(addresses[0]).login}"
        ) from error
    for address, objects in zip(addresses, found, strict=True):
        if not objects:
            raise ValueError(f"data.path: there is nothing at {address}")
    wanted = {
        name: State(*state)
        for objects in found
        for name, state in objects.items()
        if not {"", ".", ".."} & set(name.partition("://")[2].split("/"))  # no marks of folders
    }
    try:
        _bring_up_to_date(addresses, wanted, cache_dir, later)
    except OSError as error:
        raise ValueError(
            f"cannot copy data.path={addresses[0]} to data.cache_dir={cache_dir}: {error}"
        ) from error


def _bring_up_to_date(
    addresses: Sequence[str],
    wanted: Mapping[str, State],
    cache_dir: str,
    later: tuple[str, ...],
) -> None:
    root = _path_of(cache_dir, f"{scheme_of(addresses[0])}://")
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.info("Waiting for another process of this host that copies to %s", root)
            fcntl.flock(lock, fcntl.LOCK_EX)
        paths = {_path_of(cache_dir, name): name for name in wanted}
        for place in (_path_of(cache_dir, address) for address in addresses):
            if place.is_dir():
                _delete_others(place, paths)
        lacking = {p: name for p, name in paths.items() if not _is_current(p, wanted[name])}
        size = sum(wanted[name].size for name in lacking.values())
        _check_room(size, root, cache_dir, service_of(addresses[0]).mount)
        at_once = {}
        for path, name in lacking.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if later and path.name.lower().endswith(later):
                _link(path, name, wanted[name])
            else:
                at_once[path] = name
        if not later:  # those that an image folder left for later
            at_once |= {p: name for p, name in paths.items() if p not in lacking and _address(p)}
        _fetch_all({path: (name, wanted[name]) for path, name in at_once.items()}, root)


def _delete_others(place: pathlib.Path, paths: Mapping[pathlib.Path, str]) -> None:
    sweep(place)
    for folder, _, names in os.walk(place, topdown=False):
        for name in names:
            path = pathlib.Path(folder, name)
            if path not in paths and not name.startswith("."):  # which others may be writing
                path.unlink(missing_ok=True)
        if not os.listdir(folder):  # it would be taken for a class
            os.rmdir(folder)


def _is_current(path: pathlib.Path, state: State) -> bool:
    try:
        return _state(path) == state
    except OSError:
        return False


def _check_room(size: int, root: pathlib.Path, cache_dir: str, mount: str) -> None:
    free = shutil.disk_usage(root).free
    if size > free:
        raise ValueError(
            f"data.cache_dir={cache_dir} has room for {free:,} bytes, but {size:,} are to be "
            f"copied from the bucket: choose another, or mount the bucket "
            f"({mount}) and give the path below DIR as data.path"
        )


def _link(path: pathlib.Path, address: str, state: State) -> None:
    with replacing(path) as temporary:
        temporary.symlink_to(f"{address}#{state.size}")
        os.utime(temporary, ns=state.times, follow_symlinks=False)


def _fetch(path: pathlib.Path, address: str, state: State) -> None:
    with replacing(path) as temporary:
        storage.download_object(address, state.size, temporary)
        os.utime(temporary, ns=state.times)


def _fetch_all(wanted: Mapping[pathlib.Path, tuple[str, State]], root: pathlib.Path) -> None:
    if not wanted:
        return
    total = sum(state.size for _, state in wanted.values())
    logging.info("Copying %d files, %.3g MB, to %s", len(wanted), total / 1e6, root)
    start = reported = time.monotonic()
    done = 0
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        copies = pool.map(lambda item: _fetch(item[0], *item[1]), wanted.items())
        for number, ((_, state), _) in enumerate(zip(wanted.values(), copies, strict=True), 1):
            done += state.size
            now = time.monotonic()
            if number == len(wanted) or now - reported > REPORT_SECONDS:
                rate = done / 1e6 / (now - start)
                logging.info("%d of %d files, %.3g MB/s", number, len(wanted), rate)
                reported = now
