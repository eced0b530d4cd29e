"""Pictures that come and go: uploads, of bounded size, and files of what is drawn."""

import base64
import io
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dar_jax.common.image import to_float
from dar_jax.common.typing import Bool, Float, UInt8
from dar_jax.data.decode import UnreadablePictureError, decode, decode_alpha
from dar_jax.data.transforms import center_crop
from dar_jax.serving.errors import ApiError

FORMATS = ("png", "webp", "jpeg")
UPLOADS = ("PNG", "WEBP", "JPEG")
"""Pillow's names of the formats that are opened; some of the others start programs."""
MAX_PIXELS = 2**24
"""Of an upload: a small file may hold a picture that fills the memory."""
OPAQUE = 128
"""Least opacity of a pixel that is kept."""
BEST = 100


class Output(NamedTuple):
    """`format` is one of `FORMATS`, `quality` 0 .. 100; without loss in PNG."""

    format: str = "png"
    quality: int = BEST


class Kept(NamedTuple):
    """`known` in [-1, 1], of which the pixels are kept where `mask` is True."""

    known: Float[np.ndarray, "H W 3"]
    mask: Bool[np.ndarray, "H W"]


def encode(pixels: UInt8[np.ndarray, "H W 3"], output: Output) -> str:
    """Return a file of the picture in base 64."""
    file = io.BytesIO()
    options = {"compress_level": 1} if output.format == "png" else {"quality": output.quality}
    Image.fromarray(pixels).save(file, output.format, **options)
    return base64.b64encode(file.getvalue()).decode()


def read_edit(image: bytes, mask: bytes | None, size: int) -> Kept:
    """Read what is edited; where the mask, or without one the image, is transparent, is redrawn.

    Args:
        image: file in one of `UPLOADS`.
        mask: likewise, as large as the image.
        size: side to which the middle of both is cropped and scaled.

    Raises:
        ApiError: a file cannot be read or is too large, they differ in size, or nothing is
            transparent.
    """
    bounds: dict[str, Any] = dict(formats=UPLOADS, max_pixels=MAX_PIXELS)
    name = "image"
    try:
        pixels = decode(image, name, **bounds)
        name = "image" if mask is None else "mask"
        alpha = decode_alpha(image if mask is None else mask, name, **bounds)
    except UnreadablePictureError as error:
        known = ", ".join(UPLOADS)
        raise ApiError(400, f"{error} (expected {known})", param=name, code="bad_image") from error
    if alpha.shape != pixels.shape[:2]:
        raise ApiError(
            400,
            f"the mask is {alpha.shape[1]} x {alpha.shape[0]} pixels large, the image "
            f"{pixels.shape[1]} x {pixels.shape[0]}",
            param="mask",
        )
    opacity = center_crop(np.repeat(alpha[..., None], 3, axis=-1), size)[..., 0]
    if (kept := opacity >= OPAQUE).all():
        raise ApiError(
            400, f"the {name} is transparent nowhere: there is nothing to redraw", param=name
        )
    return Kept(to_float(center_crop(pixels, size)), kept)
