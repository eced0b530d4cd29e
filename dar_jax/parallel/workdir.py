"""The directory of a run."""

import contextlib
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

from absl import logging

from dar_jax.common import storage
from dar_jax.common.files import sweep
from dar_jax.parallel import distributed
from dar_jax.parallel.leases import Leases

LOCK_NAME = ".lock"
MAX_OWNER = 200
LEASE_NAME = "run"
BUSY = "another run is at work in {directory} ({owner}); wait for its end, or use another workdir"


def open_workdir(workdir: str) -> storage.Path:
    """Return the absolute path of `workdir`, made if it is missing; a bucket has to be there.

    Raises:
        ValueError: it cannot be used, or the processes of a job do not share it.
    """
    path = storage.to_path(workdir, "workdir")
    if isinstance(path, pathlib.Path):
        return _open_local(workdir)
    storage.check_writable(path)
    distributed.check_shared(path)
    return path


def _open_local(workdir: str) -> pathlib.Path:
    if not workdir:
        raise ValueError("workdir is empty; name a directory with --workdir=DIR")
    path = pathlib.Path(workdir).absolute()
    try:
        str(path).encode()  # the storage of checkpoints takes nothing else
        path.mkdir(parents=True, exist_ok=True)
    except UnicodeEncodeError as error:
        raise ValueError(f"workdir {str(path)!a} is no UTF-8; choose another") from error
    except OSError as error:
        raise ValueError(f"cannot use workdir {path}: {error.strerror}; choose another") from error
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise ValueError(f"cannot use workdir {path}: no permission to write it; choose another")
    distributed.check_shared(path)
    sweep(path)
    return path


@contextlib.contextmanager
def exclusive(directory: storage.Path) -> Iterator[None]:
    """Keep a workdir for this run, of whatever number of processes; a kill lets go of it.

    Raises:
        ValueError: another run has it.
    """
    held = _locked(directory) if isinstance(directory, pathlib.Path) else _leased(directory)
    with contextlib.ExitStack() as stack:
        distributed.of_first(lambda: stack.enter_context(held))
        yield


@contextlib.contextmanager
def _locked(directory: pathlib.Path) -> Iterator[None]:
    path = directory / LOCK_NAME
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read(MAX_OWNER).strip() or "unknown"
            owner = f"process {owner}"
            raise ValueError(BUSY.format(directory=directory, owner=owner)) from error
        except OSError as error:
            logging.warning("%s cannot be locked (%s): start no second run in it", path, error)
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _leased(directory: storage.Path) -> Iterator[None]:
    """As `_locked`, in a bucket: what a killed run leaves there is taken over after a while."""

    def leave(name: str) -> None:
        distributed.leave(
            f"this process was silent for so long that another run took over {directory}: it goes "
            "on there"
        )

    with Leases(directory, on_lost=leave) as leases:
        if owner := leases.wait_for(LEASE_NAME):
            raise ValueError(BUSY.format(directory=directory, owner=owner))
        yield
