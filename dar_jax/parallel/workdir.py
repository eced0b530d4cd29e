"""The directory of a run."""

import contextlib
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

import jax
from absl import logging

from dar_jax.common import storage
from dar_jax.common.files import sweep
from dar_jax.parallel import distributed

LOCK_NAME = ".lock"
MAX_OWNER = 200


def open_workdir(workdir: str) -> pathlib.Path:
    """Return the absolute path of `workdir`, made if it is missing.

    Raises:
        ValueError: it cannot be used, or the processes of a job do not share it.
    """
    if not workdir:
        raise ValueError("workdir is empty; name a directory with --workdir=DIR")
    storage.check_path(workdir, "workdir")
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
def exclusive(directory: pathlib.Path) -> Iterator[None]:
    """Keep a workdir for this run, of whatever number of processes; a kill lets go of it.

    Raises:
        ValueError: another run has it.
    """
    if jax.process_index() != 0:
        yield
        return
    path = directory / LOCK_NAME
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read(MAX_OWNER).strip() or "unknown"
            raise ValueError(
                f"another run is at work in {directory} (process {owner}); wait for its end, or "
                "use another workdir"
            ) from error
        except OSError as error:
            logging.warning("%s cannot be locked (%s): start no second run in it", path, error)
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
