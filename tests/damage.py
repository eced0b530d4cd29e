"""What can happen to a file."""

import logging
from contextlib import contextmanager


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


DAMAGES = {
    "emptied": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": _flip,
    "deleted": lambda path: path.unlink(),
}


def damage(path, how):
    """Damage a file; return whether it has changed: an empty one may not."""
    before = path.read_bytes()
    if before or how == "deleted":
        DAMAGES[how](path)
    return not path.exists() or path.read_bytes() != before


@contextmanager
def warnings(caplog):
    """Gather what is warned of."""
    told = []
    with caplog.at_level(logging.WARNING, logger="absl"):
        caplog.clear()
        yield told
        told += [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def outcome(run):
    """Return what a function returns and None, or None and its refusal, which must be one line."""
    try:
        return run(), None
    except ValueError as error:
        (line,) = str(error).splitlines()
        return None, line
