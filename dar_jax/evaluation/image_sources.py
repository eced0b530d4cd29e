"""Images to be judged, wherever they are: 8-bit, of one size, in a fixed order.

Rounding to 8 bits. Samples and reconstructions are trunc(clip(127.5 x + 128, 0, 255)) of x in
[-1, 1] (`common.image.to_pixels`), as the reference writes them. Real images are the bytes of the
same centre crops that enter a model (`transforms.center_crop`), trunc(255 x) of x = pixel / 255.

Difference from the reference: it takes real images back from [-1, 1], where float32 turns 63 of
the 256 levels into the level below.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np
from absl import logging

from dar_jax.common import addresses, storage
from dar_jax.common.files import read_regular
from dar_jax.common.typing import Any, UInt8
from dar_jax.data import identity
from dar_jax.data.base import SPLIT_SEED, DataConfig
from dar_jax.data.decode import (
    MAX_FILE_BYTES,
    CorruptTally,
    UnreadablePictureError,
    decode,
    picture_suffixes,
)
from dar_jax.data.listing import list_files
from dar_jax.data.pipeline import evaluation_tally
from dar_jax.data.sources import Source, load_pictures
from dar_jax.data.transforms import center_crop
from dar_jax.evaluation.npz_images import NpzImages
from dar_jax.generation.image_set import PIXELS, ImageSet
from dar_jax.generation.resumable_arrays import MANIFEST_NAME, Pieces

NUM_THREADS = 8
"""Pictures that are decoded at the same time."""


@runtime_checkable
class Images(Protocol):
    """Images to be judged."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What they are, as JSON types: equal for equal images, whatever their number."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """Height and width.

        Raises:
            ValueError: see `read`.
        """
        ...

    def __len__(self) -> int: ...

    def read(self, first: int, stop: int) -> UInt8[np.ndarray, "n H W 3"]:
        """Return the images `first` .. `stop - 1`.

        Raises:
            ValueError: one cannot be read, or is of another size.
        """
        ...


@dataclasses.dataclass(frozen=True)
class SetImages:
    """An array of images in complete pieces: those of an `ImageSet`, or kept beside them.

    Attributes:
        pieces: where they are.
        made_with: what they depend on, as JSON types.
        name: of the array.
    """

    pieces: Pieces
    made_with: Mapping[str, Any]
    name: str = PIXELS

    @property
    def identity(self) -> Mapping[str, Any]:
        return {**self.made_with, "array": self.name}

    @property
    def size(self) -> tuple[int, int]:
        _, height, width, _ = self.read(0, 1).shape
        return height, width

    def __len__(self) -> int:
        return self.pieces.count

    def read(self, first: int, stop: int) -> UInt8[np.ndarray, "n H W 3"]:
        return np.concatenate(list(self.pieces.rows(self.name, first, stop)))


@dataclasses.dataclass(frozen=True)
class GeneratedImages(SetImages):
    """Images of classes, whose labels the pieces know."""

    pieces: ImageSet


@dataclasses.dataclass(frozen=True)
class SplitImages:
    """Centre crops of a data set, all in its own order or some at random.

    For a picture that cannot be read the next one that can stands in, as in training, up to
    `data.max_corrupt_fraction` of all pictures.

    Attributes:
        config: the data.
        split: "train" or "test".
        count: number of images; None is all, and all where there are fewer.
    """

    config: DataConfig
    split: str
    count: int | None = None

    @property
    def identity(self) -> Mapping[str, Any]:
        own_order = len(self) == len(self._source)
        return {
            "image_size": self.config.image_size,
            "split": self.split,
            "pictures": self._fingerprint,
            "order": "its own" if own_order else "random",
        }

    @functools.cached_property
    def _fingerprint(self) -> Mapping[str, Any]:
        return identity.identify(self._source, self.config.num_threads)

    @property
    def size(self) -> tuple[int, int]:
        return self.config.image_size, self.config.image_size

    @functools.cached_property
    def _source(self) -> Source:
        return load_pictures(self.config, self.split)

    @functools.cached_property
    def _order(self) -> np.ndarray:
        if len(self) == len(self._source):
            return np.arange(len(self))
        # Sources that are sorted by class would give images of few classes.
        return np.random.default_rng(SPLIT_SEED).permutation(len(self._source))

    def __len__(self) -> int:
        total = len(self._source)
        return total if self.count is None else min(self.count, total)

    def read(self, first: int, stop: int) -> UInt8[np.ndarray, "n H W 3"]:
        return _in_threads(self._crop, first, stop)

    def _crop(self, position: int) -> UInt8[np.ndarray, "H W 3"]:
        return center_crop(self._picture(position)["pixels"], self.config.image_size)

    def labels(self) -> np.ndarray:
        """Classes of all images."""
        return np.array([self._picture(position)["label"] for position in range(len(self))])

    def captions(self) -> list[str]:
        """First captions of all pictures.

        Raises:
            ValueError: the data have none, see `DataConfig.captions`.
        """
        found = getattr(self._source, "captions", ())
        if not found:
            raise ValueError("config.data.captions=False, but captions are needed here; set it")
        return [found[int(index)][0] for index in self._order]

    @functools.cached_property
    def _tally(self) -> CorruptTally:
        return evaluation_tally(self.config)

    def _picture(self, position: int) -> dict[str, Any]:
        first, count = int(self._order[position]), len(self._source)
        for index in range(first, first + count):
            try:
                return self._source[index % count]
            except UnreadablePictureError as error:
                self._tally.add(error)
        raise ValueError(f"none of the {count} pictures of the {self.split} split can be read")


@dataclasses.dataclass(frozen=True)
class FolderImages:
    """The picture files below a folder, in the order of their paths."""

    root: pathlib.Path
    paths: tuple[pathlib.Path, ...]

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"files": self._fingerprint}

    @functools.cached_property
    def _fingerprint(self) -> Mapping[str, Any]:
        names = (path.relative_to(self.root).as_posix() for path in self.paths)
        stamps = map(identity.stamp_of, map(str, self.paths), names)
        return identity.fingerprint(stamps, len(self.paths), self._bytes, threads=NUM_THREADS)

    def _bytes(self, index: int) -> bytes:
        try:
            return read_regular(self.paths[index], MAX_FILE_BYTES)
        except OSError:
            return b""  # whoever reads it as a picture says so

    @property
    def size(self) -> tuple[int, int]:
        return self._size

    @functools.cached_property
    def _size(self) -> tuple[int, int]:
        height, width, _ = _decode(self.paths[0]).shape
        return height, width

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, first: int, stop: int) -> UInt8[np.ndarray, "n H W 3"]:
        return _in_threads(self._read, first, stop)

    def _read(self, index: int) -> UInt8[np.ndarray, "H W 3"]:
        pixels = _decode(self.paths[index])
        if pixels.shape[:2] != self.size:
            raise ValueError(
                f"{self.root} has images of {_by(self.size)} pixels ({self.paths[0].name}) and of "
                f"{_by(pixels.shape)} ({self.paths[index].name}); all must have one size"
            )
        return pixels


def open_images(path: str) -> FolderImages | NpzImages:
    """Open a folder of pictures or a `.npz` file of images.

    Raises:
        ValueError: it is neither, or an image of a set is missing or another one.
    """
    where = storage.to_path(path, "images")
    if where.suffix == ".npz":
        return NpzImages(where)
    if not isinstance(where, pathlib.Path):
        raise ValueError(
            f"{path} is no .npz file; of folders of pictures in a bucket, mount the bucket "
            f"({addresses.service_of(path).mount}) and give the path below DIR"
        )
    if not where.is_dir():
        raise ValueError(f"{path} is neither a folder of pictures nor a .npz file")
    listing = list_files(where, picture_suffixes())
    reasons = ", ".join(f"{item.count:,} {item.reason}" for item in listing.seen.left_out)
    if not listing.paths:
        raise ValueError(
            f"{path} has no pictures (.jpg, .png, ...)"
            + (f"; left out: {reasons}" if reasons else "")
        )
    if reasons:
        logging.warning("%s: %d pictures; left out: %s", path, len(listing.paths), reasons)
    if (where / MANIFEST_NAME).is_file():
        ImageSet(where, 0, (0,), "png").check_files()
    return FolderImages(where, tuple(sorted(where / name for name in listing.paths)))


def read_all(images: Images) -> UInt8[np.ndarray, "N H W 3"]:
    """Read all images at once: small ones."""
    return images.read(0, len(images))


def check_size(images: Images, other: Images) -> None:
    """Raise ValueError unless both have images of one size."""
    if images.size != other.size:
        raise ValueError(
            f"images of {_by(images.size)} pixels cannot be compared with images of "
            f"{_by(other.size)}"
        )


def _decode(path: pathlib.Path) -> UInt8[np.ndarray, "H W 3"]:
    try:
        return decode(read_regular(path, MAX_FILE_BYTES), str(path))
    except (OSError, UnreadablePictureError) as error:
        raise ValueError(f"cannot read {error}") from error


def _in_threads(read_one: Any, first: int, stop: int) -> UInt8[np.ndarray, "n H W 3"]:
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return np.stack(list(pool.map(read_one, range(first, stop))))


def _by(size: tuple[int, ...]) -> str:
    return f"{size[0]} x {size[1]}"
