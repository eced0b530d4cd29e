"""Signal-to-noise ratio of 8-bit images."""

import numpy as np
import pytest

from dar_jax.evaluation.reconstruction import psnr


def test_psnr_equals_definition():
    original = np.full((2, 4, 4, 3), 100, np.uint8)
    other = original.copy()
    other[0] += 10  # mean squared error 100
    other[1] += 1  # 1
    expected = np.mean([10 * np.log10(255**2 / 100), 10 * np.log10(255**2)])
    assert psnr(original, other) == pytest.approx(expected, rel=1e-12)


def test_psnr_of_identical_images_is_finite():
    image = np.zeros((1, 2, 2, 3), np.uint8)
    assert psnr(image, image) == pytest.approx(10 * np.log10(255**2 * 12))
