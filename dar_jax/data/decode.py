"""Bytes of a picture file to 8-bit RGB pixels.

As ADM (Dhariwal & Nichol 2021) reads its data, `PIL.Image.open(file).convert("RGB")`, so alpha is
dropped and of an animation the first frame is taken, except that

- 16-bit grey is scaled to 8 bit by its high byte, as Pillow does with 16-bit colour, instead of
  being clipped to white;
- a photograph that was taken with the camera turned (EXIF orientation) is turned upright;
- only the formats in `FORMATS` are opened, whatever a file is called (others can start programs),
  and sizes are bounded before anything is decoded.

Where the package simplejpeg is installed, it decodes plain JPEGs, to the same pixels: both ask
libjpeg-turbo.
"""

import contextlib
import functools
import importlib
import io
import struct
import types
from collections.abc import Callable, Iterator

import numpy as np
from absl import logging
from PIL import Image, ImageOps, UnidentifiedImageError

from dar_jax.common.typing import UInt8

FORMATS = (
    *("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM"),
    *("JPEG2000", "AVIF", "HEIF", "JXL", "QOI", "MPO"),
    "TGA",  # has no mark to be known by and is tried last
)
"""Pillow's names of the formats that pictures may have, where it or a plugin can read them."""
PLUGINS = ("pillow_heif", "pillow_jxl")
"""Modules that teach Pillow further formats, of the extra `images`."""
PLUGIN_SUFFIXES = (".heic", ".heif", ".hif", ".jxl")
"""Suffixes of files that only they read."""
FLOAT_SUFFIXES = (".pfm",)
"""Suffixes of maps of depth or flow, which open like pictures but are not pictures."""

MAX_FILE_BYTES = 2**30
"""A larger file is not a picture."""
MAX_ASPECT = 64
"""A picture whose sides differ more is refused: scaled to a shorter side it would be enormous."""
MAX_16_BIT = 65535
JPEG_START = b"\xff\xd8\xff"
ORIENTATION_MARKS = (b"Exif", b":Orientation")
"""Of a file that may say how the camera was turned: in EXIF or XMP data."""
PLAIN_PIXELS = 2**24
"""What Pillow refuses, or warns of, is larger."""
CORRUPT = (
    OSError,  # includes UnidentifiedImageError and truncated files
    SyntaxError,  # a broken PNG
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    RuntimeError,  # of AVIF
    ArithmeticError,
    struct.error,
    Image.DecompressionBombError,
)
"""What Pillow's plugins raise on broken files."""


class UnreadablePictureError(Exception):
    """A picture is missing, corrupt, truncated or of no known format; the message names it."""


class CorruptTally:
    """Counts the unreadable pictures and refuses too many of them."""

    def __init__(self, count: Callable[[], int], max_fraction: float):
        """Allow `max_fraction` of the pictures, which are counted when the first is unreadable."""
        self._count = count
        self._total: int | None = None
        self._max_fraction = max_fraction
        self._found: set[str] = set()

    def __len__(self) -> int:
        return len(self._found)

    def add(self, error: UnreadablePictureError) -> None:
        """Log the picture that the error names, the first time.

        Raises:
            ValueError: there are too many.
        """
        if str(error) in self._found:
            return
        self._found.add(str(error))
        logging.warning("Unreadable picture, number %d: %s", len(self), error)
        if self._total is None:
            self._total = self._count()
        if len(self) > self._max_fraction * self._total:
            raise ValueError(
                f"{len(self)} of {self._total} pictures cannot be read, more than "
                f"data.max_corrupt_fraction={self._max_fraction} allows; the last is {error}"
            )


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that are installed."""
    for module in PLUGINS:
        with contextlib.suppress(ImportError):
            plugin = importlib.import_module(module)
            if hasattr(plugin, "register_heif_opener"):
                plugin.register_heif_opener()
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def picture_suffixes() -> tuple[str, ...]:
    """Return the suffixes of files in `readable_formats`, in lower case."""
    formats = readable_formats()
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in formats}
    return tuple(sorted(known - set(FLOAT_SUFFIXES)))


def decode(
    data: bytes,
    name: str,
    *,
    formats: tuple[str, ...] | None = None,
    max_pixels: int | None = None,
    background: str = "",
) -> UInt8[np.ndarray, "H W 3"]:
    """Decode the bytes of an image file.

    Args:
        data: the bytes.
        name: for messages.
        formats: names of formats that Pillow may try; None is `readable_formats`.
        max_pixels: a picture of more is refused before it is decoded; None is Pillow's limit.
        background: colour, as Pillow names it, that shows where the picture is transparent; empty:
            alpha is dropped.

    Raises:
        UnreadablePictureError: they are corrupt, truncated, too large or too thin, or no picture.
    """
    if formats is None and max_pixels is None and (pixels := _plain_jpeg(data)) is not None:
        return pixels
    with _opened(data, name, formats, max_pixels) as image:
        image.load()
        _turn_upright(image)
        if background and image.has_transparency_data:
            canvas = Image.new("RGBA", image.size, background)
            return np.asarray(Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB"))
        return np.asarray(_to_rgb(image))


def decode_alpha(
    data: bytes, name: str, *, formats: tuple[str, ...] | None = None, max_pixels: int | None = None
) -> UInt8[np.ndarray, "H W"]:
    """Decode the opacity of an image file, 255 where it is opaque; see `decode`."""
    with _opened(data, name, formats, max_pixels) as image:
        image.load()
        _turn_upright(image)
        return np.asarray(image.convert("RGBA").getchannel("A"))


def _plain_jpeg(data: bytes) -> UInt8[np.ndarray, "H W 3"] | None:
    """Decode a JPEG to the pixels that Pillow gives, in a fraction of its time.

    None leaves the file to Pillow: without the package simplejpeg, or if it is anything but a sound
    JPEG in colour or grey, of moderate size, that says nothing of how it was turned.
    """
    simplejpeg = _simplejpeg()
    if simplejpeg is None or not data.startswith(JPEG_START):
        return None
    if any(mark in data for mark in ORIENTATION_MARKS):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        thin = max(height, width) > MAX_ASPECT * min(height, width)
        if colours not in ("YCbCr", "Gray") or height * width > PLAIN_PIXELS or thin:
            return None
        return simplejpeg.decode_jpeg(data)
    except ValueError:
        return None


@functools.cache
def _simplejpeg() -> types.ModuleType | None:
    with contextlib.suppress(ImportError):
        return importlib.import_module("simplejpeg")
    return None


def check_header(data: bytes, name: str) -> None:
    """Check all that can be told of an image file without decoding it.

    Raises:
        UnreadablePictureError: it is not a picture, or too large or too thin.
    """
    with _opened(data, name, None, None):
        pass


@contextlib.contextmanager
def _opened(
    data: bytes, name: str, formats: tuple[str, ...] | None, max_pixels: int | None
) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(data), formats=formats or readable_formats()) as image:
            _check_size(image, name, max_pixels)
            yield image
    except UnidentifiedImageError as error:
        raise UnreadablePictureError(f"{name}: not a picture of a known format") from error
    except CORRUPT as error:
        raise UnreadablePictureError(f"{name}: {error}") from error


def _check_size(image: Image.Image, name: str, max_pixels: int | None) -> None:
    size = f"{image.width} x {image.height} pixels"
    if max_pixels is not None and image.width * image.height > max_pixels:
        raise UnreadablePictureError(f"{name}: {size}, more than {max_pixels:,}")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise UnreadablePictureError(
            f"{name}: {size}, one side more than {MAX_ASPECT} times the other"
        )


def encode_png(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """Encode pixels without loss."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _turn_upright(image: Image.Image) -> None:
    # What Pillow cannot parse of a sound picture's EXIF data is not a reason to lose the picture.
    with contextlib.suppress(*CORRUPT):
        ImageOps.exif_transpose(image, in_place=True)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no range that 8 bits could stand for")
    if image.mode.startswith("I"):
        values = np.clip(np.asarray(image), 0, MAX_16_BIT)
        image = Image.fromarray((values >> 8).astype(np.uint8))
    return image.convert("RGB")
