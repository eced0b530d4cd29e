"""What people and disks do to files, and what comes of it when a command is run after it."""

import contextlib
import json
import logging
import pathlib
import shutil
import threading
from collections.abc import Iterator

from absl import logging as absl_logging

from tests.damage import DAMAGES

SAME, SAID, REFUSED = "the same", "said", "refused"
SILENT, TRACEBACK = "SILENT", "TRACEBACK"
WRONG = (SILENT, TRACEBACK)
"""Outcomes that may not be."""
ONE_LINE = (ValueError, OSError)
"""What the command line turns into one line."""
OF_SPEED = "of a step is waiting for data"
"""What may be said of a run at any time."""
MAX_EDITS = 12
"""Keys of a JSON file that are edited, spread over all of them."""


def _write(change):
    def damage(path):
        path.write_bytes(change(path.read_bytes()))

    return damage


def _flipped_at(part):
    def change(content):
        content = bytearray(content)
        if content:
            content[int(part * (len(content) - 1))] ^= 1
        return bytes(content)

    return _write(change)


def _copied(path):
    for name in (f"{path.stem} (copy){path.suffix}", f"copy_of_{path.name}", f"{path.name}~"):
        shutil.copy2(path, path.with_name(name))


def _neighbour(path):
    """The next file of its kind, in the same folder, or the only one of its name elsewhere."""
    siblings = sorted(p for p in path.parent.iterdir() if p.is_file() and p.suffix == path.suffix)
    return siblings[(siblings.index(path) + 1) % len(siblings)]


def _swapped(path):
    other = _neighbour(path)
    kept = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(kept)


def _folder(path):
    path.unlink()
    path.mkdir()


def _dangling(path):
    path.unlink()
    path.symlink_to("nowhere")


IN_PLACE = {
    **{name: DAMAGES[name] for name in ("emptied", "truncated", "flipped")},
    "cut by a byte": _write(lambda content: content[:-1]),
    **{f"flipped at {part}": _flipped_at(part) for part in (0, 0.1, 0.25, 0.6, 0.75, 0.9, 1)},
}
"""Those that leave another file of the same name, which is no whole one."""
OF_FILES = {
    **DAMAGES,
    **IN_PLACE,
    "grown": _write(lambda content: content + b"\0"),
    "renamed": lambda path: path.rename(path.with_name(f"old_{path.name}")),
    "copied beside": _copied,
    "replaced by its neighbour": lambda path: path.write_bytes(_neighbour(path).read_bytes()),
    "swapped with its neighbour": _swapped,
    "a folder in its place": _folder,
    "a dangling link": _dangling,
}
OF_FOLDERS = {
    "removed": shutil.rmtree,
    "emptied": lambda path: [
        shutil.rmtree(p) if p.is_dir() else p.unlink() for p in path.iterdir()
    ],
    "renamed": lambda path: path.rename(path.with_name(f"{path.name}.old")),
    "copied beside": lambda path: shutil.copytree(path, path.with_name(f"{path.name} (copy)")),
    "a file in its place": lambda path: (shutil.rmtree(path), path.write_text("")),
}


def _keys(value, path=()):
    """Paths of all values in JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in items:
        yield (*path, key)
        if isinstance(part, dict | list):
            yield from _keys(part, (*path, key))


def _edit(path, keys, change):
    content = json.loads(path.read_text())
    part = content
    for key in keys[:-1]:
        part = part[key]
    change(part, keys[-1])
    path.write_text(json.dumps(content))


def _other(part, key):
    value = part[key]
    if isinstance(value, bool | None):
        part[key] = not value
    elif isinstance(value, int | float):
        part[key] = value + 1
    elif isinstance(value, str):
        part[key] = f"{value}x"
    else:
        part[key] = [*value] if isinstance(value, dict) else {"x": value}


EDITS = {
    "removed": lambda part, key: part.pop(key),
    "null": lambda part, key: part.__setitem__(key, None),
    "other": _other,
}


def damages_of(path: pathlib.Path) -> Iterator[tuple[str, object]]:
    """Name and function of everything that is done to a file or folder."""
    if path.is_dir():
        for how, damage in OF_FOLDERS.items():
            yield f"folder {how}", damage
        return
    yield from OF_FILES.items()
    if path.suffix != ".json":
        return
    keys = [*_keys(json.loads(path.read_text()))]
    chosen = keys[:: max(1, -(-len(keys) // MAX_EDITS))]
    for each in chosen:
        for name, change in EDITS.items():
            text = ".".join(map(str, each))
            yield f"edited: {text} {name}", lambda p, k=each, c=change: _edit(p, k, c)


@contextlib.contextmanager
def _heard(said):
    """Gather warnings, and tracebacks of background threads."""

    class Handler(logging.Handler):
        def emit(self, record):
            if OF_SPEED not in record.getMessage():
                said.append(record.getMessage())

    handler, logger = Handler(logging.WARNING), absl_logging.get_absl_logger()
    logger.addHandler(handler)
    failed = []
    hook, threading.excepthook = threading.excepthook, failed.append
    try:
        yield failed
    finally:
        threading.excepthook = hook
        logger.removeHandler(handler)


def undisturbed(run) -> tuple[dict, set[str]]:
    """Run a command where nothing is damaged; return what it comes to, and what it says then."""
    said: list[str] = []
    with _heard(said) as failed:
        expected = run()
    assert expected and not failed
    return expected, set(said)


def outcome(run, expected: dict, usual: set[str]) -> tuple[str, str]:
    """Run a command; return what came of it, and what was said.

    Args:
        run: the command.
        expected: what it comes to where nothing is damaged.
        usual: what it says then, which warns of nothing.
    """
    said: list[str] = []
    with _heard(said) as failed:
        try:
            found = run()
        except ONE_LINE as error:
            return (REFUSED if not failed else TRACEBACK), " ".join(str(error).split())
        except Exception as error:
            return TRACEBACK, f"{type(error).__name__}: {error}"
    if failed:
        return TRACEBACK, str(failed[0])
    said = [line for line in said if line not in usual]
    differing = [name for name in expected if found.get(name) != expected[name]]
    if not differing:
        return SAME, "; ".join(said)
    return (SAID if said else SILENT), f"{'; '.join(said)} | differing: {', '.join(differing[:5])}"
