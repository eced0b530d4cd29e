"""The files of a data set: what is looked at, what is left out, and why.

Links are followed; every folder is read once, however many links lead to it, and a folder that lies
in the data set itself is read there. So links that cross or lead back end, and multiply nothing.
"""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from absl import logging

from dar_jax.data.names import is_hidden, printable

LOG_EVERY = 100_000
HIDDEN = "hidden"


class LeftOut(NamedTuple):
    """Files that are not read: why, how many, and one of them."""

    reason: str
    count: int
    example: str


@dataclasses.dataclass(frozen=True)
class Seen:
    """What was found in a data set beside what is read of it.

    Attributes:
        files: all of them.
        left_out: those that are not read.
        remarks: what else is worth a line at the start.
    """

    files: int = 0
    left_out: tuple[LeftOut, ...] = ()
    remarks: tuple[str, ...] = ()

    def without(self, *left_out: LeftOut) -> "Seen":
        """Return what was found if these are left out too."""
        added = tuple(item for item in left_out if item.count)
        return dataclasses.replace(self, left_out=self.left_out + added)


class Leaving:
    """Counts what is left out."""

    def __init__(self):
        self._counts: collections.Counter[str] = collections.Counter()
        self._examples: dict[str, str] = {}

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """Count files or folders, one of which is `example`."""
        self._counts[reason] += count
        self._examples.setdefault(reason, printable(example))

    def add_suffix(self, name: str) -> None:
        """Count a file that is left out for its suffix."""
        suffix = os.path.splitext(name)[1].lower()
        self.add(f"with the suffix {printable(suffix)}" if suffix else "without a suffix", name)

    def result(self) -> tuple[LeftOut, ...]:
        """Return them, the most frequent reason first."""
        return tuple(
            LeftOut(reason, count, self._examples[reason])
            for reason, count in self._counts.most_common()
        )


@dataclasses.dataclass(frozen=True)
class Listing:
    """Files below a folder.

    Attributes:
        paths: of those with one of the suffixes, relative to the folder: those of a folder before
            those of its subfolders, each sorted.
        seen: what else there is.
    """

    paths: tuple[str, ...]
    seen: Seen


def list_files(root: pathlib.Path, suffixes: tuple[str, ...]) -> Listing:
    """Find the files below `root` whose names end with one of the suffixes, in any case.

    Hidden files and folders are left out, and what is not a regular file. A link that leads nowhere
    is listed: its file may come back.

    Raises:
        ValueError: a folder cannot be read, for another reason than its permissions.
    """
    leaving = Leaving()
    paths: list[str] = []
    total, pairs = 0, []
    for folder, entries in _folders(root, leaving):
        names = []
        for entry in entries:
            total += 1
            path = os.path.join(folder, entry.name)
            if is_hidden(entry.name):
                leaving.add(HIDDEN, path)
            elif not entry.name.lower().endswith(suffixes):
                leaving.add_suffix(path)
            elif not _is_file(entry):
                leaving.add("neither a file nor a link to one", path)
            else:
                names.append(entry.name)
        before = len(paths)
        paths += [os.path.join(folder, name) for name in names]
        pairs += [(os.path.join(folder, a), os.path.join(folder, b)) for a, b in _views(names)]
        if len(paths) // LOG_EVERY > before // LOG_EVERY:
            logging.info("Found %d files in %s so far", len(paths), root)
    return Listing(tuple(paths), Seen(total, leaving.result(), _remarks(pairs)))


def subfolders(path: str | os.PathLike) -> tuple[str, ...]:
    """Return the names of the folders in a folder that are not hidden, sorted.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with os.scandir(path) as entries:
            return tuple(sorted(e.name for e in entries if _is_folder(e) and not is_hidden(e.name)))
    except OSError as error:
        raise _unreadable(path, error) from error


def _folders(root: pathlib.Path, leaving: Leaving) -> Iterator[tuple[str, list[os.DirEntry]]]:
    """Yield each folder, relative to `root`, and what in it is not a folder, sorted by name."""
    home = os.path.realpath(root)
    followed: set[str] = set()
    # A folder and, if it was reached by a link, where it really is.
    stack: list[tuple[str, str | None]] = [("", None)]
    while stack:
        folder, place = stack.pop()
        entries = _entries(root, folder, leaving)
        inner, files = [], []
        for entry in entries:
            (inner if _is_folder(entry) else files).append(entry)
        yield folder, files
        for entry in reversed(inner):
            path = os.path.join(folder, entry.name)
            if is_hidden(entry.name):
                leaving.add(HIDDEN, path)
                continue
            stack.append((path, _place(entry, place)))
        # Of several ways to one folder the first in the order of the listing counts.
        while stack and (target := stack[-1][1]) is not None:
            if not _is_inside(target, home) and target not in followed:
                followed.add(target)
                break
            leaving.add("link to a folder that is read already", stack.pop()[0])


def _place(entry: os.DirEntry, parent: str | None) -> str | None:
    if entry.is_symlink():
        return os.path.realpath(entry.path)
    return None if parent is None else os.path.join(parent, entry.name)


def _is_inside(target: str, home: str) -> bool:
    """Tell whether a folder is read as a part of the data set at `home`."""
    if target == home:
        return True
    inside = os.path.commonpath((target, home)) == home
    return inside and not any(map(is_hidden, os.path.relpath(target, home).split(os.sep)))


def _entries(root: pathlib.Path, folder: str, leaving: Leaving) -> list[os.DirEntry]:
    path = os.path.join(root, folder)
    try:
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except PermissionError as error:
        if not folder:
            raise _unreadable(path, error) from error
        logging.warning("No permission to read the folder %s: it is left out", printable(path))
        leaving.add("folder without permission to read it", folder)
        return []
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | os.PathLike, error: OSError) -> ValueError:
    reason = error.strerror or error
    return ValueError(f"cannot read the folder {printable(str(path))}: {reason}")


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry) -> bool:
    """Tell whether it is a regular file, a link to one, or a link to nothing."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        return True


def _views(names: Sequence[str]) -> list[tuple[str, str]]:
    """Find pictures of one folder whose names extend another's by a word: `a.jpg`, `a.seg.png`."""
    longer = [name for name in names if name.count(".") > 1]
    if not longer:
        return []
    plain = {name.partition(".")[0]: name for name in names if name.count(".") == 1}
    found = ((plain.get(name.partition(".")[0]), name) for name in longer)
    return [(first, name) for first, name in found if first is not None]


def _remarks(pairs: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    if not pairs:
        return ()
    first, second = map(printable, pairs[0])
    return (
        f"{len(pairs):,} files may be masks or second views but are read as pictures: {second} "
        f"beside {first}",
    )
