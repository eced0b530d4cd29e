"""Pixels and floats, picture grids, the reference's bicubic resize."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.common import image as image_lib
from dar_jax.common.image import grid, resize_bicubic, to_float, to_pixels


def test_pixels_survive_the_round_trip():
    pixels = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1)
    image = to_float(pixels)
    assert (image.min(), image.max()) == (-1.0, 1.0)
    np.testing.assert_array_equal(to_pixels(image), pixels)


def test_to_pixels_truncates_and_clips():
    image = jnp.array([[-2.0, -1.0, 0.0, 0.0065, 1.0, 2.0]])
    np.testing.assert_array_equal(to_pixels(image), [[0, 0, 128, 128, 255, 255]])


def test_grid_lays_pictures_out_row_by_row():
    pixels = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1).repeat(3, axis=-1)
    picture = grid(pixels, columns=2, border=1)
    white = 255
    expected = [
        [0, white, 1, white],
        [white] * 4,
        [2, white, white, white],
        [white] * 4,
    ]
    np.testing.assert_array_equal(picture[..., 0], expected)
    assert picture.shape == (4, 4, 3)


@pytest.mark.parametrize("size", [(8, 8), (5, 11), (16, 3)])
def test_resize_keeps_constants(size):
    image = jnp.full((1, 8, 8, 3), 0.7)
    np.testing.assert_allclose(resize_bicubic(image, size), 0.7, rtol=1e-6)


def test_resize_to_the_same_size_is_the_identity():
    image = jax.random.normal(jax.random.key(0), (2, 6, 5, 3))
    np.testing.assert_allclose(resize_bicubic(image, (6, 5)), image, atol=1e-6)


def test_resize_keeps_ramps_away_from_the_border():
    ramp = jnp.arange(16.0).reshape(1, 16, 1, 1)
    resized = resize_bicubic(ramp, (32, 1))[0, :, 0, 0]
    expected = (np.arange(32) + 0.5) / 2 - 0.5
    # With a = -0.75 a ramp is not kept exactly; at quarter points the error is 3/64.
    np.testing.assert_allclose(resized[6:-6], expected[6:-6], atol=0.05)


def test_rows_and_columns_are_resized_alike():
    image = jax.random.normal(jax.random.key(0), (1, 6, 9, 2))
    turned = resize_bicubic(image.transpose(0, 2, 1, 3), (4, 5)).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(resize_bicubic(image, (5, 4)), turned, atol=1e-6)


@pytest.mark.parametrize("larger", [True, False])
def test_names_of_other_letters_are_drawn_or_replaced(larger, monkeypatch):
    """No two of them look alike, as the boxes of a font without them would."""
    if not larger:
        monkeypatch.setattr(image_lib, "_larger_font", lambda: None)
    pixels = np.full((1, 64, 64, 3), 255, np.uint8)
    grid = functools.partial(image_lib.labelled_grid, pixels, columns=1)
    assert np.any(grid(["éa"]) != grid(["üa"]))
    if larger:
        assert np.any(grid(["кот"]) != grid(["тко"]))
    else:
        np.testing.assert_array_equal(grid(["éa"]), grid(["ea"]))
        np.testing.assert_array_equal(grid(["кот (5)"]), grid(["??? (5)"]))


def test_long_names_are_wrapped_and_cut_to_their_row():
    pixels = np.full((1, 64, 64, 3), 255, np.uint8)
    grid = functools.partial(image_lib.labelled_grid, pixels, columns=1)
    words = ["caption"] * 30
    assert grid([" ".join(words)]).shape[1] < 2 * grid(["caption caption caption"]).shape[1]
    np.testing.assert_array_equal(grid([" ".join(words)]), grid([" ".join(words[:-1])]))
    assert np.any(grid([" ".join(words[:6])]) != grid([" ".join(words[:3])]))
