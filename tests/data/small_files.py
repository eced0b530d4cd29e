"""Tiny picture files of one grey value, and data sets made of them."""

import numpy as np

from dar_jax.data.sources import DataConfig, load_source
from tests.data.tiny_sets import to_png, write_tar

__all__ = ["grey", "greys", "names", "open_split", "refusal", "write", "write_tar"]


def grey(value, size=8):
    """A PNG of one grey value."""
    return to_png(np.full((size, size, 3), value, np.uint8))


def write(root, *paths, value=0, **contents):
    """Write pictures below `root`, or other contents."""
    for path in (*paths, *contents):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(contents.get(path, grey(value)))


def open_split(source, root, split="train", **options):
    return load_source(DataConfig(source=source, path=str(root), **options), split)


def names(source):
    """Where the pictures are, below the last folder or tar, sorted."""
    paths = getattr(source, "paths", None) or [member.name for member in source.members]
    return sorted(paths)


def greys(source):
    """Grey values of the pictures, sorted."""
    return sorted(int(source[index]["pixels"][0, 0, 0]) for index in range(len(source)))


def refusal(function, *args, **options):
    """The message of the ValueError, which must be one line."""
    try:
        function(*args, **options)
    except ValueError as error:
        (line,) = str(error).splitlines()
        return line
    raise AssertionError("nothing was refused")
