"""A large set of images on disk: it grows in pieces, survives a kill, and ends as one file.

Image i of the set has label `labels[i % len(labels)]`, so that any number of images is balanced and
a set can be made larger later. Pieces appear whole or not at all under names that say which images
they hold, so their names alone say what is missing:

    manifest.json            what the images are made with
    00000064-00000128.npz    `arr_0` uint8 [64, H, W, 3], `labels` [64], e.g. `indices` [64, N]
    00000064.png             instead, one image a file

Several processes may write one directory at the same time: each takes every P-th batch.
`merge` writes the file that the ADM evaluation suite reads (Dhariwal & Nichol 2021,
openai/guided-diffusion): `arr_0` uint8 [N, H, W, 3] and, as its sampling script does, the labels as
`arr_1`.
"""

import dataclasses
import json
import pathlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from dar_jax.common.files import replacing
from dar_jax.common.typing import Bool, Int, UInt8

FORMATS = ("npz", "png")
MANIFEST_NAME = "manifest.json"
PIECE_NAME = re.compile(r"(\d{8})(?:-(\d{8}))?\.(npz|png)")


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """The first `num_images` images of the set in `directory`.

    Attributes:
        directory: where the pieces are.
        num_images: how many there shall be.
        labels: classes, taken in turns.
        format: of the pieces, see `FORMATS`.
    """

    directory: pathlib.Path
    num_images: int
    labels: tuple[int, ...]
    format: str = "npz"

    def bind(self, settings: Mapping[str, Any]) -> None:
        """Make the directory for images of these settings, or check that it holds such images.

        Args:
            settings: whatever the images depend on, as JSON types.

        Raises:
            ValueError: it holds images of other settings.
        """
        values = {**settings, "labels": self.labels, "format": self.format}
        text = json.dumps(values, indent=2) + "\n"
        path = self.directory / MANIFEST_NAME
        # In this order: another process writes its manifest before its pieces.
        pieces = self._pieces()
        if path.exists():
            self._compare(json.loads(path.read_text()), json.loads(text))
        elif pieces:
            raise ValueError(f"{self.directory} holds images but no {MANIFEST_NAME}; delete it")
        else:
            self.directory.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_text(text)

    def _compare(self, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        for name in {**found, **expected}:
            if found.get(name) != expected.get(name):
                raise ValueError(
                    f"{self.directory} holds images of {name}={found.get(name)}, not "
                    f"{expected.get(name)}; choose another --workdir or delete that directory"
                )

    def labels_of(self, first: int, stop: int) -> Int[np.ndarray, " n"]:
        """Labels of the images `first` .. `stop - 1`."""
        return np.int32(self.labels)[np.arange(first, stop) % len(self.labels)]

    def missing(self) -> Bool[np.ndarray, " N"]:
        """True for every image that is not there yet."""
        missing = np.ones(self.num_images, bool)
        for first, stop, _ in self._pieces():
            missing[first:stop] = False
        return missing

    def runs(
        self, batch_size: int, process_index: int = 0, process_count: int = 1
    ) -> Iterator[tuple[int, int]]:
        """Yield runs (first, stop) of missing images, at most `batch_size` long.

        Batches are dealt to the processes by their place in the set, not by what is missing, which
        changes while others write.
        """
        missing = self.missing()
        for start in range(process_index * batch_size, self.num_images, process_count * batch_size):
            window = np.pad(missing[start : start + batch_size].astype(int), 1)
            edges = np.flatnonzero(np.diff(window)).reshape(-1, 2)
            yield from ((start + int(first), start + int(stop)) for first, stop in edges)

    def write(
        self, first: int, pixels: UInt8[np.ndarray, "n H W 3"], kept: Mapping[str, np.ndarray]
    ) -> None:
        """Write the images from `first` on.

        Args:
            first: index of the first one.
            pixels: the images.
            kept: arrays [n, ...] to write beside them where the format has room.
        """
        stop = first + len(pixels)
        if self.format == "png":
            for index, image in zip(range(first, stop), pixels, strict=True):
                with replacing(self.directory / f"{index:08d}.png") as temporary:
                    Image.fromarray(image).save(temporary)
            return
        labels = self.labels_of(first, stop)
        with replacing(self.directory / f"{first:08d}-{stop:08d}.npz") as temporary:
            np.savez(temporary, arr_0=pixels, labels=labels, **kept)

    def read(self) -> Iterator[UInt8[np.ndarray, "n H W 3"]]:
        """Yield all images in order, piece by piece.

        Raises:
            ValueError: an image is missing, a piece cannot be read, or images differ in size.
        """
        known, size = 0, None
        for first, stop, path in self._pieces():
            if known >= self.num_images or first > known:
                break
            pixels = _read_piece(path)[known - first : self.num_images - first]
            size = size or pixels.shape[1:]
            if len(pixels) and pixels.shape[1:] != size:
                raise ValueError(f"{path} holds images of {pixels.shape[1:]}, others {size}")
            known = max(known, min(stop, self.num_images))
            yield pixels
        if known < self.num_images:
            raise ValueError(f"{self.directory} lacks image {known} of {self.num_images}")

    def merge(self, path: pathlib.Path) -> None:
        """Write all images to one `.npz` without holding more than a piece of them.

        Raises:
            ValueError: see `read`.
        """
        height, width, channels = next(self.read()).shape[1:]
        shape = (self.num_images, height, width, channels)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for pixels in self.read():
                    file.write(np.ascontiguousarray(pixels).data)
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, self.labels_of(0, self.num_images))

    def _pieces(self) -> list[tuple[int, int, pathlib.Path]]:
        """(first, stop, path) of every piece, in order."""
        if not self.directory.is_dir():
            return []
        pieces = []
        for path in self.directory.iterdir():
            if match := PIECE_NAME.fullmatch(path.name):
                first, stop, _ = match.groups()
                pieces.append((int(first), int(stop or int(first) + 1), path))
        return sorted(pieces)


def _read_piece(path: pathlib.Path) -> UInt8[np.ndarray, "n H W 3"]:
    try:
        if path.suffix == ".png":
            return np.asarray(Image.open(path).convert("RGB"))[None]
        with np.load(path) as arrays:
            return arrays["arr_0"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot read {path} ({error}); delete it and run again") from error
