"""Digests: of values, of files, and of all files of a directory, kept in it to check them by.

    digests.json    {"state/manifest.ocdbt": "1f598e5c...", ...}

What is written with its digests is checked when it is read, so that damage is noticed.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dar_jax.common import storage
from dar_jax.common.files import parse_json, read_regular, write_json

DIGESTS_NAME = "digests.json"
MAX_BYTES = 2**26
NUM_THREADS = 8
"""Files that are read at the same time."""
SHORT = 12
"""Characters of a digest that are shown."""


def of_json(values: Any) -> str:
    """Digest of values of JSON types."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def of_file(path: str | os.PathLike) -> str:
    """Digest of the content of a file.

    Raises:
        OSError: it cannot be read.
    """
    with storage.open_binary(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_files(paths: Iterable[str | os.PathLike]) -> list[str]:
    """Digests of the contents of files, read by several threads.

    Raises:
        OSError: one cannot be read.
    """
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(of_file, paths))


def write(directory: storage.Path, *, but: Collection[str] = ()) -> None:
    """Write the digests of all files below a directory to it.

    Args:
        directory: of the files.
        but: names of files that are still going to change.

    Raises:
        OSError: a file cannot be read or the directory not written.
    """
    left_out = {DIGESTS_NAME, *but}
    paths = [p for p in storage.files_below(directory) if p.name not in left_out]
    names = [path.relative_to(directory).as_posix() for path in paths]
    write_json(directory / DIGESTS_NAME, dict(zip(names, of_files(paths), strict=True)))


def has(directory: storage.Path) -> bool:
    """Tell whether a directory holds digests."""
    return (directory / DIGESTS_NAME).is_file()


def find_damage(directory: storage.Path, names: Collection[str] | None = None) -> str:
    """Say which file of a directory is not as it was written; "" if all are.

    Args:
        directory: one that has digests.
        names: files to look at; None: all that have a digest.
    """
    try:
        expected = parse_json(read_regular(directory / DIGESTS_NAME, MAX_BYTES))
        if not isinstance(expected, dict) or not all(isinstance(v, str) for v in expected.values()):
            return f"{DIGESTS_NAME} holds no digests"
    except (OSError, ValueError) as error:
        return f"{DIGESTS_NAME} cannot be read ({getattr(error, 'strerror', None) or error})"
    checked = [name for name in expected if names is None or name in names]
    for name in checked:
        if not (directory / name).is_file():
            return f"{name} is missing"
    try:
        found = of_files([directory / name for name in checked])
    except OSError as error:
        return str(error)
    for name, digest in zip(checked, found, strict=True):
        if digest != expected[name]:
            is_empty = digest == hashlib.sha256().hexdigest()
            return f"{name} is empty" if is_empty else f"the content of {name} has changed"
    return ""
