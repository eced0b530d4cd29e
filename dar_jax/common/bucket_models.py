"""Model directories in buckets, as local copies that last as long as the process."""

import functools
import pathlib
import shutil
import tempfile

from dar_jax.common import digests, storage
from dar_jax.common.files import parse_json, read_regular


def download(path: storage.Path, inner: str) -> pathlib.Path:
    """Return a local copy of a model directory.

    It is what the digests say that are written last, so that one that is half written is not taken.

    Args:
        path: of the model directory in a bucket, or of a workdir that has one.
        inner: the name that it has there.

    Raises:
        ValueError: there is none, or it is not complete.
    """
    try:
        for directory in (path / inner, path):
            if digests.has(directory):
                text = read_regular(directory / digests.DIGESTS_NAME, digests.MAX_BYTES)
                return _copy(str(directory), text)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    raise ValueError(
        f"{path} holds no model directory, or one that is not complete: {digests.DIGESTS_NAME}, "
        "which is written last, is not there; pass what training and convert write to WORKDIR/model"
    )


@functools.cache
def _copies() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="dar_jax-")


def _copy(directory: str, text: bytes) -> pathlib.Path:
    """Copy the files that `text`, the digests, names; what an earlier model left goes."""
    # The path has the address in it, for whoever reads it in an error.
    target = pathlib.Path(_copies().name, directory.partition("://")[2]).resolve()
    path = target / digests.DIGESTS_NAME
    if path.is_file() and path.read_bytes() == text:
        return target
    names = list(parse_json(text))
    if not all(isinstance(n, str) and (target / n).resolve().is_relative_to(target) for n in names):
        raise ValueError(f"{directory}/{digests.DIGESTS_NAME} names no files below it")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    storage.download(storage.to_path(directory), names, target)
    path.write_bytes(text)
    return target
