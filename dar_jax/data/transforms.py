"""Crops as ADM (Dhariwal & Nichol 2021, guided-diffusion `image_datasets.py`) takes them.

To give a picture's shorter side a length, it is halved with a box filter while it is at least
twice as long, and then resized with Pillow's antialiased bicubic filter; a picture that is too
small is enlarged by the latter alone. Everything stays 8-bit RGB, as Pillow rounds it, until
`common.image.to_float` maps it to [-1, 1].
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from dar_jax.common.typing import UInt8

MIN_CROP_FRACTION = 0.8
"""A random crop is at least this part of the shorter side."""
TEN_CROP_MARGIN = 1.1
"""The ten crops are taken from a centre crop this much larger."""

Pixels = UInt8[np.ndarray, "_ _ 3"]


def resize_shorter_side(pixels: Pixels, length: int) -> Pixels:
    """Resize so that the shorter side has `length` pixels, keeping the proportions."""
    if min(pixels.shape[:2]) == length:
        return pixels
    image = Image.fromarray(pixels)
    while min(image.size) >= 2 * length:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = length / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def center_crop(pixels: Pixels, size: int) -> Pixels:
    """Crop the central square of the picture and resize it: ADM's `center_crop_arr`."""
    pixels = resize_shorter_side(pixels, size)
    height, width, _ = pixels.shape
    return _cut(pixels, (height - size) // 2, (width - size) // 2, size)


def random_crop(pixels: Pixels, size: int, rng: np.random.Generator) -> Pixels:
    """Crop a random square: ADM's `random_crop_arr`.

    The shorter side gets a length that is uniform over the integers `size` to
    ceil(size / MIN_CROP_FRACTION); the square's place is uniform.
    """
    length = int(rng.integers(size, math.ceil(size / MIN_CROP_FRACTION), endpoint=True))
    pixels = resize_shorter_side(pixels, length)
    height, width, _ = pixels.shape
    top = int(rng.integers(height - size, endpoint=True))
    left = int(rng.integers(width - size, endpoint=True))
    return _cut(pixels, top, left, size)


def random_square(pixels: Pixels, size: int, rng: np.random.Generator) -> Pixels:
    """Crop a random square of the full shorter side and resize it (bicubic), as TransDiff does."""
    side = min(pixels.shape[:2])
    top, left = (int(rng.integers(length - side, endpoint=True)) for length in pixels.shape[:2])
    square = Image.fromarray(_cut(pixels, top, left, side))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


def ten_crop(pixels: Pixels, size: int) -> UInt8[np.ndarray, "10 _ _ 3"]:
    """Take ten squares of a centre crop with int(1.1 * size) pixels a side.

    Returns:
        Top left, top right, bottom left, bottom right and centre, then the same five of the
        mirrored picture: the order of torchvision's `TenCrop`, which the reference uses, and its
        rounding of the centre, half a pixel going to the even side.
    """
    pixels = center_crop(pixels, int(TEN_CROP_MARGIN * size))
    return np.concatenate([_five_crop(pixels, size), _five_crop(mirror(pixels), size)])


def random_ten_crop(pixels: Pixels, size: int, rng: np.random.Generator) -> Pixels:
    """Take one of the ten crops."""
    return ten_crop(pixels, size)[rng.integers(10)]


def random_shift(pixels: Pixels, padding: int, rng: np.random.Generator) -> Pixels:
    """Repeat the border pixels `padding` times on all sides and cut out a picture of the old size.

    The place is uniform, so the content moves by -padding .. padding pixels along each axis.
    Repeating the border suits any background; for CIFAR it is zeros (He et al. 2016, section 4.2).
    """
    top, left = rng.integers(2 * padding, size=2, endpoint=True)
    return all_shifts(pixels, padding)[top, left]


def all_shifts(pixels: Pixels, padding: int) -> UInt8[np.ndarray, "places places _ _ 3"]:
    """All pictures that `random_shift` may return, by top and left: a view, not to be written."""
    padded = np.pad(pixels, ((padding, padding), (padding, padding), (0, 0)), "edge")
    return np.lib.stride_tricks.sliding_window_view(padded, pixels.shape)[:, :, 0]


def mirror(pixels: Pixels) -> Pixels:
    """Exchange left and right."""
    return pixels[:, ::-1]


def _five_crop(pixels: Pixels, size: int) -> UInt8[np.ndarray, "5 _ _ 3"]:
    margin = len(pixels) - size
    middle = round(margin / 2)
    corners = ((0, 0), (0, margin), (margin, 0), (margin, margin), (middle, middle))
    return np.stack([_cut(pixels, top, left, size) for top, left in corners])


def _cut(pixels: Pixels, top: int, left: int, size: int) -> Pixels:
    return pixels[top : top + size, left : left + size]


CROPS: dict[str, Callable[[Pixels, int, np.random.Generator], Pixels]] = {
    "center": lambda pixels, size, rng: center_crop(pixels, size),
    "random": random_crop,
    "square": random_square,
    "ten_crop": random_ten_crop,
}
"""How a picture becomes a training example; `DataConfig.crop` names one."""
