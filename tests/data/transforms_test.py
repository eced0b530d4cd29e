"""Crops against ADM's arithmetic, written out here with Pillow's calls alone."""

import collections
import math

import numpy as np
import pytest
from PIL import Image

from dar_jax.data import transforms

SHAPES = [(97, 61), (61, 97), (131, 53), (33, 33), (16, 200), (7, 5), (64, 64), (65, 129)]


def picture(height, width, seed=0):
    """A smooth gradient with noise, so that filters and offsets show."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, height)[:, None, None] * np.ones((1, width, 3))
    return (ramp + rng.integers(0, 56, (height, width, 3))).astype(np.uint8)


def reference_resize(pixels, length):
    """Shorter side to `length`, as guided-diffusion's `image_datasets.py` does it."""
    image = Image.fromarray(pixels)
    while min(*image.size) >= 2 * length:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.BOX)
    scale = length / min(*image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.BICUBIC)
    return np.array(image)


def reference_center_crop(pixels, size):
    array = reference_resize(pixels, size)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [16, 31])
def test_center_crop_is_adms_pixel_for_pixel(shape, size):
    pixels = picture(*shape)
    found = transforms.center_crop(pixels, size)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, reference_center_crop(pixels, size))


@pytest.mark.parametrize("shape", [(97, 61), (16, 200), (33, 33)])
def test_random_square_has_the_full_shorter_side(shape):
    size, pixels, side = 20, picture(*shape), min(shape)
    places = set()
    for seed in range(8):
        found = transforms.random_square(pixels, size, np.random.default_rng(seed))
        squares = [
            Image.fromarray(pixels[top : top + side, left : left + side])
            for top in range(shape[0] - side + 1)
            for left in range(shape[1] - side + 1)
        ]
        resized = [np.array(s.resize((size, size), Image.BICUBIC)) for s in squares]
        matches = [np.array_equal(found, expected) for expected in resized]
        assert any(matches)
        places.add(matches.index(True))
    assert len(places) > 2 or shape[0] == shape[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_random_crop_is_a_square_of_adms_resizing(shape):
    size, pixels = 20, picture(*shape)
    for seed in range(5):
        found = transforms.random_crop(pixels, size, np.random.default_rng(seed))
        # The same draws: a length, then a row and a column.
        rng = np.random.default_rng(seed)
        resized = reference_resize(pixels, rng.integers(size, math.ceil(size / 0.8) + 1))
        top = rng.integers(resized.shape[0] - size + 1)
        left = rng.integers(resized.shape[1] - size + 1)
        expected = resized[top : top + size, left : left + size]
        assert found.shape == (size, size, 3)
        np.testing.assert_array_equal(found, expected)


def test_random_crop_uses_every_length_and_both_ends(monkeypatch):
    lengths, offsets = [], []
    resize, cut = transforms.resize_shorter_side, transforms._cut
    monkeypatch.setattr(
        transforms,
        "resize_shorter_side",
        lambda pixels, length: lengths.append(length) or resize(pixels, length),
    )
    monkeypatch.setattr(
        transforms,
        "_cut",
        lambda p, top, left, size: (
            offsets.append((top == 0, top + size == len(p))) or cut(p, top, left, size)
        ),
    )
    rng = np.random.default_rng(0)
    for _ in range(200):
        transforms.random_crop(picture(24, 24), 8, rng)
    assert set(lengths) == {8, 9, 10}  # 8 / 0.8
    assert (True, False) in offsets and (False, True) in offsets


def test_ten_crop_is_five_crops_of_the_picture_and_of_its_mirror_image():
    size, pixels = 16, picture(40, 50)
    whole = reference_center_crop(pixels, 17)  # int(1.1 * 16)
    expected = []
    for image in (whole, whole[:, ::-1]):
        for top, left in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 0)):  # round(0.5) = 0: the centre
            expected.append(image[top : top + size, left : left + size])
    np.testing.assert_array_equal(transforms.ten_crop(pixels, size), expected)


def test_ten_crop_at_256_pixels_has_a_margin_of_25():
    pixels = np.arange(281, dtype=np.uint16).astype(np.uint8)
    pixels = np.broadcast_to(pixels[:, None, None], (281, 281, 3))
    rows = transforms.ten_crop(pixels, 256)[:, 0, 0, 0]
    assert rows.tolist() == [0, 0, 25, 25, 12] * 2


def test_random_ten_crop_takes_each_of_the_ten():
    pixels = picture(44, 44)
    crops = [crop.tobytes() for crop in transforms.ten_crop(pixels, 30)]
    rng = np.random.default_rng(0)
    found = {transforms.random_ten_crop(pixels, 30, rng).tobytes() for _ in range(200)}
    assert found == set(crops) and len(found) == 10


def test_random_shift_moves_the_content_by_up_to_the_padding_and_repeats_the_border():
    pixels, padding = picture(9, 12), 2
    rows, columns = np.arange(9), np.arange(12)
    expected = {
        (down, right): pixels[np.clip(rows - down, 0, 8)][:, np.clip(columns - right, 0, 11)]
        for down in range(-padding, padding + 1)
        for right in range(-padding, padding + 1)
    }
    shifts = {moved.tobytes(): shift for shift, moved in expected.items()}
    rng = np.random.default_rng(0)
    counts = collections.Counter(
        shifts[transforms.random_shift(pixels, padding, rng).tobytes()] for _ in range(1000)
    )
    assert set(counts) == set(expected) and len(shifts) == 25
    assert min(counts.values()) > 15  # of 40: the draws are uniform
