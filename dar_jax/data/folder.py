"""A folder of pictures with a folder per class: `CLASS/any/depth/name.jpg`.

A part that is held out is a folder beside the training part: `train/CLASS/...` and `val/CLASS/...`;
`names` says what they may be called, and what counts. Without one, a fraction of every class is
held out.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence

from absl import logging

from dar_jax.common.files import read_regular
from dar_jax.data import mirror
from dar_jax.data.base import (
    DataConfig,
    EncodedSource,
    existing_directory,
    hold_out,
    read_classes,
    spread,
)
from dar_jax.data.decode import MAX_FILE_BYTES, picture_suffixes
from dar_jax.data.listing import LeftOut, Listing, Seen, list_files, subfolders
from dar_jax.data.names import Splits, find_splits, listed, printable, warn_of_names

Classes = tuple[tuple[str, str], ...]
"""Class folder and name of the class, in the order of the labels."""


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource(EncodedSource):
    """The pictures `root/paths[i]` with their labels, and what else was seen there.

    `captions` are theirs, if they are read.
    """

    root: pathlib.Path
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]
    seen: Seen = Seen()
    captions: tuple[tuple[str, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return printable(str(self.root / self.paths[index]))

    def path(self, index: int) -> pathlib.Path:
        """Return the file of a picture, see `mirror.fetch`."""
        return mirror.fetch(self.root / self.paths[index])

    def fetch(self, index: int) -> tuple[bytes, int]:
        return read_regular(self.path(index), MAX_FILE_BYTES), self.labels[index]


def load_folder(config: DataConfig, split: str) -> FolderSource:
    """Open a split of `config.path`.

    Raises:
        ValueError: it has no pictures, the classes are others than `config.classes`, the two parts
            do not fit together, or nothing can be held out.
    """
    root = existing_directory(config)
    splits = find_parts(root)
    train_root = root / splits.train if splits else root
    classes = _classes(config, train_root, title=root)
    beside = _beside(splits)
    if splits is None or splits.held_out is None:
        whole, *parts = _draw(train_root, classes, config.test_fraction, beside)
        if split == "test" and not parts[1]:
            raise ValueError(
                f"the test split of {train_root} has no pictures: no class has two, of which one "
                "could be held out; add pictures, or a folder val/ beside train/"
            )
        return select(whole, parts[split != "train"])
    if split == "train":
        source = _open(train_root, classes)
        return dataclasses.replace(source, seen=source.seen.without(*beside))
    held_out = root / splits.held_out
    _check_held_out(config, held_out, classes, train_root=train_root)
    source = _open(held_out, classes)
    return select(source, spread(source.paths))


@functools.lru_cache(maxsize=8)  # warns once
def find_parts(root: pathlib.Path) -> Splits | None:
    """Return the parts of the data set in a folder, or None if its folders are classes.

    Raises:
        ValueError: see `names.find_splits`.
    """
    return find_splits(subfolders(root), lambda name: subfolders(root / name), str(root))


def open_folder(config: DataConfig, root: pathlib.Path, suffixes: tuple[str, ...]) -> FolderSource:
    """Open all files with one of the suffixes below `root`, CLASS/name.

    Raises:
        ValueError: there are none, or the classes are others than `config.classes`.
    """
    return _open(root, _classes(config, root, suffixes), suffixes)


@functools.lru_cache(maxsize=8)
def _files(root: pathlib.Path, suffixes: tuple[str, ...]) -> Listing:
    return list_files(root, suffixes or picture_suffixes())


@functools.lru_cache(maxsize=8)
def scan(root: pathlib.Path, suffixes: tuple[str, ...] = ()) -> dict[str, tuple[str, ...]]:
    """Find the files below `root`: class folder -> paths relative to `root`, both sorted.

    Files in `root` itself have the class folder "". Without suffixes it is pictures that are found.
    """
    found: dict[str, list[str]] = {}
    for path in _files(root, suffixes).paths:
        folder, separator, _ = path.partition(os.sep)
        found.setdefault(folder if separator else "", []).append(path)
    return {name: tuple(found[name]) for name in sorted(found)}


def _classes(
    config: DataConfig,
    root: pathlib.Path,
    suffixes: tuple[str, ...] = (),
    *,
    title: pathlib.Path | None = None,
) -> Classes:
    found = scan(root, suffixes)
    if not found:
        kinds = "pictures (.jpg, .png, .webp, ...)" if not suffixes else f"files {suffixes[0]}"
        raise ValueError(
            f"data.path={str(root)!r} has no {kinds}; expected a folder per class, CLASS/name.jpg"
            f"{_reasons(_files(root, suffixes).seen)}"
        )
    wanted = read_classes(config.classes)
    if wanted is None:
        return _all_classes(root, suffixes, title or root)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(
            f"data.classes={config.classes!r} names {listed(missing)}, "
            f"but {root} has no pictures in such folders"
        )
    return tuple(wanted.items())


@functools.lru_cache(maxsize=8)  # warns once
def _all_classes(root: pathlib.Path, suffixes: tuple[str, ...], title: pathlib.Path) -> Classes:
    found = scan(root, suffixes)
    names = [name for name in found if name]
    if not names:
        logging.warning("%s has no class folders: all its pictures are of one class", root)
        return (("", printable(os.path.basename(os.path.abspath(title)))),)
    if "" in found:
        logging.warning("Ignoring %d pictures of %s in no class folder", len(found[""]), root)
    empty = [name for name in subfolders(root) if name not in found]
    if empty:
        logging.warning("%s: %s without pictures is not a class", root, listed(empty))
    if len(names) == 1:
        (name,) = names
        if all(len(pathlib.PurePath(path).parts) > 2 for path in found[name]):
            raise ValueError(
                f"data.path={str(root)!r} has a single class folder, {name!r}, with nothing but "
                f"further folders: if these are the classes, use --config.data.path={root / name}"
            )
        logging.warning("%s has a single class, %r", root, name)
    warn_of_names(names)
    return tuple((name, printable(name)) for name in names)


def _check_held_out(
    config: DataConfig, held_out: pathlib.Path, classes: Classes, *, train_root: pathlib.Path
) -> None:
    """Refuse a held-out part that has no pictures, or that has not the classes of training."""
    found = scan(held_out)
    way_out = f"or move {held_out} away, and a part of {train_root} is held out"
    if not found:
        reasons = _reasons(_files(held_out, ()).seen)
        raise ValueError(f"{held_out} has no pictures{reasons}; add some, {way_out}")
    is_flat = [name for name, _ in classes] == [""]
    if not is_flat and set(found) == {""}:
        raise ValueError(
            f"{held_out} has pictures but no class folders, {train_root} has: sort the pictures "
            f"into CLASS/name.jpg, {way_out}"
        )
    names = [name for name in found if name]
    if is_flat and names:
        raise ValueError(
            f"{held_out} has the class folders {listed(names)}, but {train_root} has none: sort "
            "the pictures into CLASS/name.jpg in both"
        )
    unknown = [name for name in names if name not in dict(classes)]
    if unknown and not config.classes:
        raise ValueError(
            f"{held_out} has classes that the training part has not: {listed(unknown)}; "
            "remove them, or list the classes to use in --config.data.classes=FILE.json"
        )
    if not set(found) & set(dict(classes)):
        raise ValueError(
            f"{held_out} has no pictures of the classes in data.classes={config.classes!r}; add "
            f"some, {way_out}"
        )


@functools.lru_cache(maxsize=2)
def _draw(
    root: pathlib.Path, classes: Classes, fraction: float, beside: tuple[LeftOut, ...]
) -> tuple[FolderSource, list[int], list[int]]:
    """Return all pictures, and the indices of those to train on and of those held out."""
    whole = _open(root, classes)
    whole = dataclasses.replace(whole, seen=whole.seen.without(*beside))
    return (whole, *hold_out(whole.paths, whole.labels, fraction))


def _open(
    root: pathlib.Path, classes: Classes | Mapping[str, str], suffixes: tuple[str, ...] = ()
) -> FolderSource:
    found = scan(root, suffixes)
    pairs = [(path, i) for i, (name, _) in enumerate(classes) for path in found.get(name, ())]
    paths, labels = zip(*pairs, strict=True) if pairs else ((), ())
    used = dict(classes)
    seen = _files(root, suffixes).seen.without(
        *(
            LeftOut(f"in {'no class folder' if not name else 'other classes'}", len(of), of[0])
            for name, of in found.items()
            if name not in used
        )
    )
    return FolderSource(root, paths, labels, tuple(title for _, title in classes), seen)


def select(source: FolderSource, indices: Sequence[int]) -> FolderSource:
    """Return the source of some of the files, in this order, without their captions."""
    return dataclasses.replace(
        source,
        paths=tuple(source.paths[i] for i in indices),
        labels=tuple(source.labels[i] for i in indices),
    )


def _beside(splits: Splits | None) -> tuple[LeftOut, ...]:
    """Return the folders that are no part of the data."""
    if splits is None or not splits.others:
        return ()
    return (LeftOut(f"folder beside {splits.train}", len(splits.others), splits.others[0]),)


def _reasons(seen: Seen) -> str:
    """Say what there is instead of pictures."""
    items = [f"{count:,} {reason}" for reason, count, _ in seen.left_out[:3]]
    return f" (left out: {', '.join(items)})" if items else ""
