"""A folder of pictures with a folder per class: `CLASS/any/depth/name.jpg`.

A part that is held out is a folder beside `train`: `train/CLASS/...` and `val/CLASS/...`
(or another of `HELD_OUT_NAMES`). Without one, a fraction of every class is held out.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence

from absl import logging

from dar_jax.data.base import (
    HELD_OUT_NAMES,
    DataConfig,
    EncodedSource,
    existing_directory,
    hold_out,
    read_classes,
    spread,
)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
TRAIN_NAME = "train"
LOG_EVERY = 100_000
MAX_LISTED = 5


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource(EncodedSource):
    """The pictures `root/paths[i]` with their labels."""

    root: pathlib.Path
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.root / self.paths[index])

    def fetch(self, index: int) -> tuple[bytes, int]:
        return (self.root / self.paths[index]).read_bytes(), self.labels[index]


def load_folder(config: DataConfig, split: str) -> FolderSource:
    """Open a split of `config.path`.

    Raises:
        ValueError: it has no pictures, or the classes are others than `config.classes`.
    """
    root = existing_directory(config)
    train_root = root / TRAIN_NAME if _has_folders(root / TRAIN_NAME) else root
    held_out = next((root / name for name in HELD_OUT_NAMES if (root / name).is_dir()), None)
    classes = _classes(config, train_root)
    if train_root == root or held_out is None:
        whole = _open(train_root, classes)
        parts = hold_out(whole.paths, whole.labels, config.test_fraction)
        return select(whole, parts[split != TRAIN_NAME])
    if split == TRAIN_NAME:
        return _open(train_root, classes)
    if not config.classes:
        _refuse_unknown(held_out, classes)
    source = _open(held_out, classes)
    return select(source, spread(source.paths))


def open_folder(config: DataConfig, root: pathlib.Path, suffixes: tuple[str, ...]) -> FolderSource:
    """Open all files with one of the suffixes below `root`, CLASS/name.

    Raises:
        ValueError: there are none, or the classes are others than `config.classes`.
    """
    return _open(root, _classes(config, root, suffixes), suffixes)


@functools.lru_cache(maxsize=8)
def scan(root: pathlib.Path, suffixes: tuple[str, ...] = SUFFIXES) -> dict[str, tuple[str, ...]]:
    """Find the pictures below `root`: class folder -> paths relative to `root`, both sorted.

    Pictures in `root` itself have the class folder "". Hidden files and folders do not count.
    """
    found: dict[str, list[str]] = {}
    count = 0
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = pathlib.PurePath(folder).relative_to(root)
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(suffixes):
                found.setdefault((*relative.parts, "")[0], []).append(str(relative / name))
                count += 1
                if count % LOG_EVERY == 0:
                    logging.info("Found %d pictures in %s so far", count, root)
    return {name: tuple(found[name]) for name in sorted(found)}


def _classes(
    config: DataConfig, root: pathlib.Path, suffixes: tuple[str, ...] = SUFFIXES
) -> dict[str, str]:
    """Class folder -> name of the class, in the order of the labels."""
    found = scan(root, suffixes)
    if not found:
        raise ValueError(
            f"data.path={str(root)!r} has no pictures ({', '.join(suffixes)}); "
            "expected a folder per class, CLASS/name.jpg"
        )
    wanted = read_classes(config.classes)
    if wanted is None:
        return _all_classes(root, suffixes)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(
            f"data.classes={config.classes!r} names {_listed(missing)}, "
            f"but {root} has no pictures in such folders"
        )
    return wanted


def _all_classes(root: pathlib.Path, suffixes: tuple[str, ...]) -> dict[str, str]:
    found = scan(root, suffixes)
    names = [name for name in found if name]
    if not names:
        logging.warning("%s has no class folders: all its pictures are of one class", root)
        return {"": root.name}
    if "" in found:
        logging.warning("Ignoring %d pictures of %s in no class folder", len(found[""]), root)
    if len(names) == 1:
        (name,) = names
        if all(len(pathlib.PurePath(path).parts) > 2 for path in found[name]):
            raise ValueError(
                f"data.path={str(root)!r} has a single class folder, {name!r}, with nothing but "
                f"further folders: if these are the classes, use --config.data.path={root / name}"
            )
        logging.warning("%s has a single class, %r", root, name)
    return {name: name for name in names}


def _refuse_unknown(root: pathlib.Path, classes: Mapping[str, str]) -> None:
    unknown = [name for name in scan(root) if name and name not in classes]
    if unknown:
        raise ValueError(
            f"{root} has classes that the training part has not: {_listed(unknown)}; "
            "remove them, or list the classes to use in --config.data.classes=FILE.json"
        )


def _open(
    root: pathlib.Path, classes: Mapping[str, str], suffixes: tuple[str, ...] = SUFFIXES
) -> FolderSource:
    found = scan(root, suffixes)
    pairs = [(path, label) for label, name in enumerate(classes) for path in found.get(name, ())]
    paths, labels = zip(*pairs, strict=True) if pairs else ((), ())
    return FolderSource(root, paths, labels, tuple(classes.values()))


def select(source: FolderSource, indices: Sequence[int]) -> FolderSource:
    """Return the source of some of the files, in this order."""
    return dataclasses.replace(
        source,
        paths=tuple(source.paths[i] for i in indices),
        labels=tuple(source.labels[i] for i in indices),
    )


def _has_folders(path: pathlib.Path) -> bool:
    return path.is_dir() and any(child.is_dir() for child in path.iterdir())


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(map(repr, names[:MAX_LISTED])) + more
