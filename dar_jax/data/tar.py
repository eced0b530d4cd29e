"""WebDataset tars: `NAME.jpg` beside `NAME.cls`, or `CLASS/NAME.jpg`, in plain tar files.

The headers are read once; after that a picture is one read at its offset. A `.cls` file holds a
label in decimal digits. Shards whose names or folders have a word of `HELD_OUT_NAMES` in them
(`imagenet-val-0001.tar`) are held out; without any, a fraction of every class is.
"""

import dataclasses
import functools
import os
import pathlib
import re
import tarfile
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
from dar_jax.data.folder import SUFFIXES

LABEL_SUFFIX = ".cls"


@dataclasses.dataclass(frozen=True)
class Member:
    """A picture in a tar.

    Attributes:
        path: the tar.
        name: of the member.
        offset: of its first byte in the tar.
        size: in bytes.
        label: the content of its `.cls` file, or else the name of its folder.
    """

    path: str
    name: str
    offset: int
    size: int
    label: int | str


@dataclasses.dataclass(frozen=True, eq=False)
class TarSource(EncodedSource):
    """Members of tars with their labels."""

    members: tuple[Member, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        return f"{self.members[index].path}:{self.members[index].name}"

    def fetch(self, index: int) -> tuple[bytes, int]:
        member = self.members[index]
        with open(member.path, "rb") as file:
            file.seek(member.offset)
            return file.read(member.size), self.labels[index]


def load_tar(config: DataConfig, split: str) -> TarSource:
    """Open a split of the tars in `config.path`.

    Raises:
        ValueError: there are none, one is compressed or cut short, or a picture has no class.
    """
    root = existing_directory(config)
    tars = sorted(path for path in root.rglob("*.tar*") if path.is_file())
    if not tars:
        raise ValueError(f"data.path={config.path!r} has no .tar files")
    members = tuple(member for path in tars for member in index_tar(path))
    if not members:
        raise ValueError(f"the tars of data.path={config.path!r} hold no pictures")
    classes = _classes(config, members)
    members = tuple(member for member in members if member.label in classes)
    indices = {label: index for index, label in enumerate(classes)}
    labels = tuple(indices[member.label] for member in members)
    source = TarSource(members, labels, tuple(classes.values()))

    names = [source.name(index) for index in range(len(source))]
    apart = [_is_held_out(pathlib.Path(member.path).relative_to(root)) for member in members]
    if any(apart):
        kept = [index for index in range(len(source)) if not apart[index]]
        held_out = [index for index in spread(names) if apart[index]]
    else:
        kept, held_out = hold_out(names, source.labels, config.test_fraction)
    return _select(source, kept if split == "train" else held_out)


@functools.cache
def index_tar(path: pathlib.Path) -> tuple[Member, ...]:
    """Find the pictures of a tar by reading its headers.

    Raises:
        ValueError: it is compressed, cut short or no tar, or a picture has no class.
    """
    logging.info("Reading the headers of %s", path)
    pictures, texts = {}, {}
    try:
        with tarfile.open(path, "r:") as file:
            for info in file:
                key, suffix = _key(info.name), pathlib.PurePath(info.name).suffix.lower()
                if info.isfile() and suffix in SUFFIXES:
                    pictures[key] = info
                elif info.isfile() and suffix == LABEL_SUFFIX:
                    texts[key] = file.extractfile(info).read()
    except (tarfile.TarError, OSError) as error:
        raise ValueError(
            f"{path} is no tar that pictures can be read from ({error}): it must be complete "
            "and not compressed"
        ) from error
    return tuple(
        Member(str(path), info.name, info.offset_data, info.size, _label(path, info, texts, key))
        for key, info in pictures.items()
    )


def _key(name: str) -> str:
    """Members of one record have one name up to the first dot of its last part."""
    folder, base = os.path.split(name)
    return os.path.join(folder, base.partition(".")[0])


def _label(
    path: pathlib.Path, info: tarfile.TarInfo, texts: Mapping[str, bytes], key: str
) -> int | str:
    if key in texts:
        try:
            return int(texts[key])
        except ValueError as error:
            raise ValueError(f"{path}: {key}.cls holds {texts[key]!r}, no number") from error
    folder = pathlib.PurePath(info.name).parent.name
    if not folder:
        raise ValueError(
            f"{path}: {info.name} has no class; expected {key}{LABEL_SUFFIX} beside it, "
            "or a folder that is named after the class"
        )
    return folder


def _classes(config: DataConfig, members: Sequence[Member]) -> dict[int | str, str]:
    """Label in the tars -> name of the class, in the order of the labels."""
    found = {member.label for member in members}
    wanted = read_classes(config.classes)
    if all(isinstance(label, int) for label in found):
        names = list(map(str, range(max(found) + 1))) if wanted is None else list(wanted.values())
        if min(found) < 0 or max(found) >= len(names):
            raise ValueError(
                f"the tars of data.path={config.path!r} have labels {min(found)} to {max(found)}, "
                f"but there are {len(names)} classes"
            )
        return dict(enumerate(names))
    if any(isinstance(label, int) for label in found):
        raise ValueError(
            f"the tars of data.path={config.path!r} name some classes by {LABEL_SUFFIX} files and "
            "others by folders"
        )
    missing = sorted(set(wanted or ()) - found)
    if missing:
        raise ValueError(
            f"data.classes={config.classes!r} names {missing[0]!r}, which no tar of "
            f"{config.path} has"
        )
    return wanted or {name: name for name in sorted(found)}


def _is_held_out(path: pathlib.PurePath) -> bool:
    words = re.split(r"[^a-z]+", str(path).lower())
    return not set(words).isdisjoint(HELD_OUT_NAMES)


def _select(source: TarSource, indices: Sequence[int]) -> TarSource:
    return dataclasses.replace(
        source,
        members=tuple(source.members[i] for i in indices),
        labels=tuple(source.labels[i] for i in indices),
    )
