"""The directory of a run."""

import os
import pathlib

from dar_jax.parallel import distributed


def open_workdir(workdir: str) -> pathlib.Path:
    """Return the absolute path of `workdir`, made if it is missing.

    Raises:
        ValueError: it cannot be used, or the processes of a job do not share it.
    """
    if not workdir:
        raise ValueError("workdir is empty; name a directory with --workdir=DIR")
    path = pathlib.Path(workdir).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot use workdir {path}: {error.strerror}; choose another") from error
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise ValueError(f"cannot use workdir {path}: no permission to write it; choose another")
    distributed.check_shared(path)
    return path
