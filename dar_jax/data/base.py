"""What a data set is: its configuration, and random access to labelled pictures of any size."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from dar_jax.common import storage
from dar_jax.common.files import parse_json, read_regular
from dar_jax.common.typing import Any
from dar_jax.data.decode import UnreadablePictureError, decode
from dar_jax.data.transforms import CROPS

SPLITS = ("train", "test")
SPLIT_SEED = 0
"""Seed of every held-out split that is drawn."""
AUTO = "auto"
"""As many reading processes as the cores allow."""
MAX_READERS = 1_024
"""Threads or processes that read; more only exhaust the machine."""
MAX_JSON_BYTES = 2**28
"""Largest file that describes data; a larger one is something else."""

READING_KEYS = ("path", "cache_dir", "num_threads", "num_workers", "max_corrupt_fraction")
"""Keys of `DataConfig` that say how the data are read, not which they are."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data of one run.

    Attributes:
        source: "folder", "records", "codes", "latents", "latent_folder", "tar", "tfds:NAME",
            "mnist", "emoji" or "synthetic".
        path: directory of the data; for tfds its data_dir, "" being tfds's own; for tars also one
            tar, or many by braces, "set-{000000..000146}.tar"; for emoji the npm package's file.
        cache_dir: where what `path` names in a bucket is copied to, see `data.mirror`.
        classes: JSON file with the classes in the order of their labels: a list of their names in
            the data, or an object that maps these to names for people. "": all, sorted. Folders
            and tars can choose; others are refused if they have other classes.
        captions: train on captions, see `captions`, and only on pictures that have one. In tars
            and TFDS, labels do not matter then.
        test_fraction: part held out of every class, where the data have no held-out part, see
            `names`.
        image_size: height and width of a training example, in pixels.
        crop: how a picture becomes a training example, see `transforms.CROPS`; the others are
            cropped at the centre.
        padding: pixels that a training example gets on all sides before a square of its size is cut
            out of it again: it is moved by up to as many along each axis; 0: it stays.
        flip: mirror every other training example.
        num_references: pictures of one class in a training example, in an axis of their own; 1: a
            training example is a picture.
        references: index file of such groups, see `data.references`; "": they are drawn.
        batch_size: pictures per step over all processes.
        num_threads: readers per process.
        num_workers: reading processes beside each training process, each with `num_threads`; 0
            reads in the training process, which is faster on few cores; "auto" is one for every
            two cores, where there are more than four and pictures are to be decoded.
        max_corrupt_fraction: part of a process's pictures that may be unreadable: of those to
            train on when training, of all when held-out ones are read.
    """

    source: str = "mnist"
    path: str = ""
    cache_dir: str = "~/.cache/dar_jax/data"
    classes: str = ""
    captions: bool = False
    test_fraction: float = 0.02
    image_size: int = 32
    crop: str = "center"
    padding: int = 0
    flip: bool = False
    num_references: int = 1
    references: str = ""
    batch_size: int = 128
    num_threads: int = 8
    num_workers: int | str = AUTO
    max_corrupt_fraction: float = 0.01

    def __post_init__(self):
        for name in ("image_size", "batch_size", "num_threads", "num_references"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not positive")
        workers = str(self.num_workers)  # a flag gives text
        if workers != AUTO and not workers.removeprefix("-").isdecimal():
            raise ValueError(f"num_workers {workers!r} is neither {AUTO} nor a number")
        most = {
            "num_threads": (self.num_threads, MAX_READERS),
            "num_workers": (0 if workers == AUTO else int(workers), MAX_READERS),
            "padding": (self.padding, self.image_size),
        }
        for name, (value, limit) in most.items():
            if value < 0:
                raise ValueError(f"{name} {value} is negative")
            if value > limit:
                raise ValueError(f"{name} {value} is too many, at most {limit}")
        if self.crop not in CROPS:
            raise ValueError(f"unknown crop {self.crop!r}; available: {', '.join(CROPS)}")
        if self.references and self.num_references == 1:
            raise ValueError(f"references={self.references!r} needs num_references=4")
        if not 0 < self.test_fraction < 1:
            raise ValueError(f"test_fraction {self.test_fraction} is not between 0 and 1")
        if not 0 <= self.max_corrupt_fraction < 1:
            raise ValueError(
                f"max_corrupt_fraction {self.max_corrupt_fraction} is not in 0 <= fraction < 1"
            )


@runtime_checkable
class Source(Protocol):
    """Random access to labelled pictures; may be pickled and read from several threads."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each label 0..num_classes-1."""
        ...

    @property
    def num_classes(self) -> int: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `{"pixels": uint8 [H, W, 3], "label": int32 []}`.

        Raises:
            UnreadablePictureError: the picture is corrupt; it may be skipped.
        """
        ...

    def read(self, index: int) -> "EncodedPicture":
        """Return the picture as a file has it, not yet decoded.

        Raises:
            UnreadablePictureError: there is nothing to read; it may be skipped.
        """
        ...


class EncodedPicture(NamedTuple):
    """A picture as a file holds it.

    Attributes:
        data: the bytes of a JPEG, PNG or other file.
        label: its class.
        name: where it is, for messages.
    """

    data: bytes
    label: int
    name: str


class EncodedSource:
    """A source of encoded pictures; subclasses say where they are."""

    class_names: tuple[str, ...]

    def name(self, index: int) -> str:
        """Say where a picture is."""
        raise NotImplementedError

    def fetch(self, index: int) -> tuple[bytes, int]:
        """Return the bytes of a picture's file and its label.

        Raises:
            OSError: it cannot be read.
        """
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def read(self, index: int) -> EncodedPicture:
        name = self.name(index)
        try:
            data, label = self.fetch(index)
        except OSError as error:
            raise UnreadablePictureError(f"{name}: {error.strerror or error}") from error
        if not 0 <= label < self.num_classes:
            raise ValueError(f"{name} has label {label}, but there are {self.num_classes} classes")
        return EncodedPicture(data, label, name)

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture = self.read(index)
        pixels = decode(picture.data, picture.name)
        return {"pixels": pixels, "label": np.int32(picture.label)}


def hold_out(
    names: Sequence[str], labels: Sequence[int], fraction: float
) -> tuple[list[int], list[int]]:
    """Split a data set that has no held-out part: a fraction of every class is held out.

    A picture's place depends on its name alone, so pictures that are added later move few of the
    others. A class of two pictures or more is in both parts.

    Args:
        names: of the pictures, each unique.
        labels: of the pictures.
        fraction: to hold out.

    Returns:
        Indices of the kept pictures, and of those held out, in the order of `spread`.
    """
    classes: dict[int, list[int]] = {}
    for index in spread(names):
        classes.setdefault(labels[index], []).append(index)
    chosen = set()
    for members in classes.values():
        count = max(1, round(fraction * len(members)))
        chosen.update(members[: min(count, len(members) - 1)])
    kept = [index for index in range(len(names)) if index not in chosen]
    return kept, [index for index in spread(names) if index in chosen]


def spread(names: Sequence[str]) -> list[int]:
    """Order indices by the hash of their names, so that the first ones are of all classes."""

    def rank(index: int) -> bytes:
        # Names of files may hold bytes that are no UTF-8.
        return hashlib.sha256(names[index].encode(errors="surrogateescape")).digest()

    return sorted(range(len(names)), key=rank)


def read_classes(path: str) -> dict[str, str] | None:
    """Read `DataConfig.classes`: names in the data -> names for people, in the order of labels.

    Returns:
        None if `path` is empty.

    Raises:
        ValueError: the file cannot be read or is something else.
    """
    if not path:
        return None
    try:
        content = parse_json(read_regular(storage.to_path(path, "data.classes"), MAX_JSON_BYTES))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read data.classes={path!r} as JSON: {error}") from error
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        if len(set(content)) < len(content):
            raise ValueError(f"data.classes={path!r} names a class twice")
        content = {name: name for name in content}
    named = isinstance(content, dict) and content
    if not named or not all(isinstance(name, str) for name in named.values()):
        raise ValueError(
            f"data.classes={path!r} must hold a list of class names, or an object "
            '{"name in the data": "name for people"}'
        )
    return named


def existing_directory(config: DataConfig) -> pathlib.Path:
    """Return `config.path`.

    Raises:
        ValueError: it is not a directory.
    """
    path = pathlib.Path(config.path)
    if not config.path or not path.is_dir():
        raise ValueError(
            f"data.path={config.path!r} is not a directory; source {config.source!r} needs "
            "--config.data.path=DIR"
        )
    return path
