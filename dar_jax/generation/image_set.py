"""A large set of images on disk: it grows in pieces, survives a kill, and ends as one file.

Image i of the set has label `labels[i % len(labels)]`, so that any number of images is balanced and
a set can be made larger later. See `generation.resumable_arrays` for how pieces come to be:

    manifest.json            what the images are made with
    00000064-00000128.npz    `arr_0` uint8 [64, H, W, 3], `labels` [64], e.g. `indices` [64, N]
    00000064.png             instead, one image a file

`merge` writes the file that the ADM evaluation suite reads (Dhariwal & Nichol 2021,
openai/guided-diffusion): `arr_0` uint8 [N, H, W, 3] and, as its sampling script does, the labels as
`arr_1`.
"""

import dataclasses
import re
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from dar_jax.common import storage
from dar_jax.common.files import ARCHIVE_ERRORS, replacing
from dar_jax.common.typing import Shaped, UInt8
from dar_jax.generation.resumable_arrays import MANIFEST_NAME, NUM_THREADS, Pieces, comment_of

FORMATS = ("npz", "png")
PIXELS = "arr_0"
"""Name of the array of images, here and in the files of the ADM evaluation suite."""
MARK = "dar_jax"
"""Name of the text in a PNG that says which image of which set it is."""


@dataclasses.dataclass(frozen=True)
class ImageSet(Pieces):
    """The first `count` images of the set in `directory`.

    Attributes:
        directory: where the pieces are.
        count: how many images there shall be.
        labels: classes, or texts, taken in turns.
        format: of the pieces, see `FORMATS`.
    """

    labels: tuple[int, ...] | tuple[str, ...]
    format: str = "npz"

    piece_name = re.compile(r"(\d{8})(?:-(\d{8}))?\.(npz|png)")

    def bind(self, settings: Mapping[str, Any]) -> None:
        super().bind({**settings, "labels": self.labels, "format": self.format})

    def labels_of(self, first: int, stop: int) -> Shaped[np.ndarray, " n"]:
        """Labels of the images `first` .. `stop - 1`."""
        return label_array(self.labels)[np.arange(first, stop) % len(self.labels)]

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
                path = self.directory / f"{index:08d}.png"
                texts = PngImagePlugin.PngInfo()
                texts.add_text(MARK, self._mark(path))
                with replacing(path) as temporary:
                    Image.fromarray(image).save(temporary, pnginfo=texts)
            return
        self.save(first, {PIXELS: pixels, "labels": self.labels_of(first, stop), **kept})

    def merge(self, path: storage.Path) -> None:
        """Write all images to one `.npz` without holding more than a piece of them.

        Raises:
            ValueError: see `rows`.
        """
        height, width, channels = next(self.rows(PIXELS)).shape[1:]
        shape = (self.count, height, width, channels)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for pixels in self.rows(PIXELS):
                    file.write(np.ascontiguousarray(pixels).data)
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, self.labels_of(0, self.count))
            archive.comment = self._mark(path).encode()

    def is_merged(self, path: storage.Path) -> bool:
        """Tell whether a file is what `merge` made of this set, not of one that was here before."""
        return comment_of(path) == self._mark(path)

    def check_files(self) -> None:
        """Check that the files of a set of PNGs are those that were drawn, up to the last one.

        Of what is older than marks, or of somebody else, nothing is known.

        Raises:
            ValueError: one is missing or damaged, or another one lies in its place.
        """
        pieces = self._pieces()
        if not any(_mark_of(path) for _, _, path in pieces[:2]):
            return
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            are_whole = [*pool.map(self._is_whole, (path for _, _, path in pieces))]
        for index, ((first, _, path), is_whole) in enumerate(zip(pieces, are_whole, strict=True)):
            if first != index or not is_whole:
                what = f"image {index} is missing" if first != index else f"{path.name} is damaged"
                raise ValueError(
                    f"{self.directory}: {what}; run the command that drew the set again, or move "
                    f"{MANIFEST_NAME} away to take what is there"
                )

    def _is_whole(self, path: storage.Path) -> bool:
        if path.suffix != ".png":
            return super()._is_whole(path)
        try:
            with storage.open_binary(path) as file, Image.open(file) as image:
                image.verify()
        except ARCHIVE_ERRORS:  # a SyntaxError is what Pillow raises
            return False
        return _mark_of(path) in ("", self._mark(path))

    def _read(self, path: storage.Path, name: str) -> Shaped[np.ndarray, "n ..."]:
        if path.suffix != ".png":
            return super()._read(path, name)
        try:
            with storage.open_binary(path) as file:
                return np.asarray(Image.open(file).convert("RGB"))[None]
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read {path} ({error}); delete it and run again") from error


def _mark_of(path: storage.Path) -> str:
    """What a PNG says of itself; "" if it says nothing, or cannot be read."""
    try:
        with storage.open_binary(path) as file, Image.open(file) as image:
            return str(image.info.get(MARK, ""))
    except ARCHIVE_ERRORS:
        return ""


def label_array(labels: Sequence[int | str]) -> np.ndarray:
    """Labels as int32, texts as they are."""
    return np.asarray(labels, str if isinstance(labels[0], str) else np.int32)
