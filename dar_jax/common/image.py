"""Images and pixels: `image` is float in [-1, 1], `pixels` is uint8; channels last."""

import importlib.util
import math
import pathlib
import textwrap
import unicodedata
from collections.abc import Sequence
from typing import cast

import einops
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dar_jax.common.checks import check_finite
from dar_jax.common.typing import Any, AnyArray, Array, Float, UInt8

RGB = 3
MAX_VALUE = 16.0
"""Resizing and reconstructing overshoot [-1, 1] by less; pixels that were not scaled by more."""
LEGIBLE_SIZE = 64
FONT_SIZE = 14
FONT_MARGIN = 6
LINE_HEIGHT, LINE_LENGTH = 18, 28
"""Of names that are wrapped: in pixels, and in characters."""
FONT_NAME = "DejaVuSans.ttf"
NO_CHARACTER = "\uffff"
"""No font has it."""
BICUBIC_A = -0.75
"""Cubic coefficient of the reference's resize (`torch.nn.functional.interpolate`)."""


def to_float(
    pixels: UInt8[AnyArray, "*batch C"],
) -> Float[AnyArray, "*batch C"]:
    """Map uint8 0..255 to float32 [-1, 1]."""
    return pixels.astype(np.float32) / 127.5 - 1.0


def as_image(name: str, images: Array | np.ndarray) -> Any:
    """Return images as floats in [-1, 1]; uint8 is taken for pixels.

    Raises:
        ValueError: they are of another type, not finite or far out of range, as far as can be seen
            without waiting for a device.
    """
    if images.dtype == np.uint8:
        return to_float(cast(Any, images))
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"{name} are {images.dtype}, expected floats in [-1, 1], or uint8 pixels in 0..255"
        )
    if isinstance(images, np.ndarray) and images.size:
        check_finite(name, images)
        if (largest := np.max(np.abs(images))) > MAX_VALUE:
            raise ValueError(
                f"{name} hold {largest:g}, expected floats in [-1, 1], or uint8 pixels in 0..255"
            )
    return images


def to_pixels(
    image: Float[AnyArray, "*batch C"],
) -> UInt8[AnyArray, "*batch C"]:
    """Map float to uint8 as the reference's sampling scripts do: trunc(clip(127.5 x + 128)).

    Like `to_float`, it computes where the image is: what is on the host stays there.
    """
    xp = image.__array_namespace__()
    return xp.clip(127.5 * image + 128.0, 0.0, 255.0).astype(np.uint8)


def grid(pixels: UInt8[np.ndarray, "N H W C"], columns: int, border: int = 1) -> np.ndarray:
    """Lay N pictures out row by row in `columns` columns: uint8 [rows*(H+border), ..., C].

    Cells past the last picture stay white.
    """
    rows = -(-len(pixels) // columns)
    padded = np.full((rows * columns, *pixels.shape[1:]), 255, np.uint8)
    padded[: len(pixels)] = pixels
    cells = np.pad(padded, ((0, 0), (0, border), (0, border), (0, 0)), constant_values=255)
    return einops.rearrange(cells, "(r c) h w ch -> (r h) (c w) ch", c=columns)


def resize_bicubic(image: Float[Array, "*batch H W C"], size: tuple[int, int]) -> Array:
    """Resize to `size` = (height, width) with a = -0.75, half-pixel centres, no antialiasing.

    `jax.image.resize` differs (a = -0.5, antialiased when shrinking); the reference's released
    numbers depend on this kernel. Source indices are clamped to the border.
    """
    rows = jnp.asarray(bicubic_matrix(image.shape[-3], size[0]), image.dtype)
    columns = jnp.asarray(bicubic_matrix(image.shape[-2], size[1]), image.dtype)
    return jnp.einsum("...hwc,yh,xw->...yxc", image, rows, columns)


def bicubic_matrix(size_in: int, size_out: int, step: float | None = None) -> np.ndarray:
    """Interpolation weights [size_out, size_in] in float64.

    Args:
        size_in: number of source pixels.
        size_out: number of pixels to make.
        step: distance of their centres in source pixels; None is size_in / size_out.
    """
    step = size_in / size_out if step is None else step
    centre = (np.arange(size_out) + 0.5) * step - 0.5
    first = np.floor(centre).astype(int) - 1
    matrix = np.zeros((size_out, size_in))
    for tap in range(4):
        weight = _cubic(np.abs(centre - (first + tap)))
        index = np.clip(first + tap, 0, size_in - 1)
        np.add.at(matrix, (np.arange(size_out), index), weight)
    return matrix


def _cubic(distance: np.ndarray) -> np.ndarray:
    near = ((BICUBIC_A + 2) * distance - (BICUBIC_A + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * BICUBIC_A - 4 * BICUBIC_A
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))


def _larger_font() -> ImageFont.FreeTypeFont | None:
    """Return a font of more than ASCII letters, of Matplotlib or the system, if there is one."""
    places = [FONT_NAME]
    if spec := importlib.util.find_spec("matplotlib"):
        folder = pathlib.Path(spec.origin or "").parent
        places.insert(0, str(folder / "mpl-data" / "fonts" / "ttf" / FONT_NAME))
    for place in places:
        try:
            return ImageFont.truetype(place, FONT_SIZE)
        except OSError:
            continue
    return None


def _draws(font: Any, character: str) -> bool:
    """Whether a font has the character, and does not draw the box of what it has not."""
    return bytes(font.getmask(character)) != bytes(font.getmask(NO_CHARACTER))


def _legible(font: Any, name: str) -> str:
    """Replace what the font does not have: letters by those without accent, others by "?"."""

    def letter(character: str) -> str:
        plain = unicodedata.normalize("NFKD", character)[:1]
        return next((c for c in (character, plain) if _draws(font, c)), "?")

    return "".join(map(letter, name))


def _wrapped(name: str, height: int) -> str:
    """Break a long name into lines, as many as a row of that height holds."""
    lines = textwrap.wrap(
        name, LINE_LENGTH, max_lines=max(1, height // LINE_HEIGHT), placeholder=" ..."
    )
    return name if len(name) <= LINE_LENGTH else "\n".join(lines)


def _fitted(name: str, width: int, font: Any) -> str:
    """Break a name into lines of so many pixels, as far as its words and hyphens allow."""
    length = font.getlength(name)
    if length <= width:
        return name
    letters = max(1, int(width * len(name) / length))
    return "\n".join(textwrap.wrap(name, letters, break_long_words=False))


def labelled_grid(
    pixels: UInt8[np.ndarray, "N H W C"],
    names: Sequence[str],
    columns: int,
    header: Sequence[str] = (),
) -> np.ndarray:
    """Lay pictures out like `grid`, enlarged to a legible size.

    A name stands left of every row, wrapped if it is long; with a `header`, one above every column,
    wrapped if it is longer than the column is wide.
    """
    scale = max(1, LEGIBLE_SIZE // pixels.shape[1])
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    body = grid(pixels, columns)
    font = ImageFont.load_default(FONT_SIZE)
    if not all(_draws(font, character) for name in names for character in name):
        font = _larger_font() or font
        names = [_legible(font, name) for name in names]
    names = [_wrapped(name, body.shape[0] // len(names)) for name in names]
    lines = [line for name in names for line in name.split("\n")]
    left = max(math.ceil(font.getlength(line)) for line in lines) + 2 * FONT_MARGIN
    header = [_fitted(name, body.shape[1] // columns, font) for name in header]
    num_lines = max((name.count("\n") + 1 for name in header), default=0)
    top = num_lines * LINE_HEIGHT + 2 * FONT_MARGIN if header else 0
    canvas = Image.new("RGB", (left + body.shape[1], top + body.shape[0]), "white")
    draw = ImageDraw.Draw(canvas)
    for column, name in enumerate(header):
        # A word that is too long ends where the next name begins.
        cell = (left + column * body.shape[1] // columns, 0, *canvas.size)
        draw.rectangle(cell, fill="white")
        draw.text((cell[0], top / 2), name, fill="black", font=font, anchor="lm")
    canvas.paste(Image.fromarray(body), (left, top))
    for row, name in enumerate(names):
        middle = top + (row + 0.5) * body.shape[0] / len(names)
        draw.text((FONT_MARGIN, middle), name, fill="black", font=font, anchor="lm")
    return np.asarray(canvas)
