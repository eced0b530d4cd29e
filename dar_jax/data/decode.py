"""Bytes of a picture file to 8-bit RGB pixels.

As ADM (Dhariwal & Nichol 2021) reads its data, `PIL.Image.open(file).convert("RGB")`, so alpha is
dropped and of an animation the first frame is taken, except that

- 16-bit grey is scaled to 8 bit by its high byte, as Pillow does with 16-bit colour, instead of
  being clipped to white;
- a photograph that was taken with the camera turned (EXIF orientation) is turned upright.
"""

import contextlib
import io
import struct
from collections.abc import Sequence

import numpy as np
from absl import logging
from PIL import Image, ImageOps, UnidentifiedImageError

from dar_jax.common.typing import UInt8

MAX_16_BIT = 65535
CORRUPT = (
    OSError,  # includes UnidentifiedImageError and truncated files
    SyntaxError,  # a broken PNG
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    NotImplementedError,
    struct.error,
    Image.DecompressionBombError,
)
"""What Pillow's plugins raise on broken files."""


class UnreadablePictureError(Exception):
    """A picture is missing, corrupt, truncated or of no known format; the message names it."""


class CorruptTally:
    """Counts the unreadable pictures and refuses too many of them."""

    def __init__(self, num_pictures: int, max_fraction: float):
        """Allow `max_fraction` of `num_pictures`."""
        self._num_pictures = num_pictures
        self._max_fraction = max_fraction
        self._found: set[int] = set()

    def __len__(self) -> int:
        return len(self._found)

    def add(self, index: int, error: UnreadablePictureError) -> None:
        """Log the picture `index`, the first time.

        Raises:
            ValueError: there are too many.
        """
        if index in self._found:
            return
        self._found.add(index)
        logging.warning("Unreadable picture, number %d: %s", len(self), error)
        if len(self) > self._max_fraction * self._num_pictures:
            raise ValueError(
                f"{len(self)} of {self._num_pictures} pictures cannot be read, more than "
                f"data.max_corrupt_fraction={self._max_fraction} allows; the last is {error}"
            )


def decode(
    data: bytes,
    name: str,
    *,
    formats: Sequence[str] | None = None,
    max_pixels: int | None = None,
) -> UInt8[np.ndarray, "H W 3"]:
    """Decode the bytes of an image file.

    Args:
        data: the bytes.
        name: for messages.
        formats: names of formats that Pillow may try; None is all that it knows.
        max_pixels: a picture of more is refused before it is decoded.

    Raises:
        UnreadablePictureError: they are corrupt, truncated, too large or no picture.
    """
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                size = f"{image.width} x {image.height}"
                raise UnreadablePictureError(f"{name}: {size} pixels, more than {max_pixels:,}")
            image.load()
            _turn_upright(image)
            return np.asarray(_to_rgb(image))
    except UnidentifiedImageError as error:
        raise UnreadablePictureError(f"{name}: not a picture of a known format") from error
    except CORRUPT as error:
        raise UnreadablePictureError(f"{name}: {error}") from error


def encode_png(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """Encode pixels without loss."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _turn_upright(image: Image.Image) -> None:
    # What Pillow cannot parse of a sound picture's EXIF data is no reason to lose the picture.
    with contextlib.suppress(*CORRUPT):
        ImageOps.exif_transpose(image, in_place=True)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no range that 8 bits could stand for")
    if image.mode.startswith("I"):
        values = np.clip(np.asarray(image), 0, MAX_16_BIT)
        image = Image.fromarray((values >> 8).astype(np.uint8))
    return image.convert("RGB")
