"""Signal-to-noise ratio and LPIPS of 8-bit images."""

import jax
import numpy as np
import pytest

from dar_jax.evaluation import perceptual
from dar_jax.evaluation.perceptual import psnr
from dar_jax.models.frozen.lpips import Lpips, LpipsConfig, StageConfig
from dar_jax.nn.functional_model import FunctionalModel


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


def test_lpips_is_the_mean_over_all_pairs_whatever_the_batches(monkeypatch):
    small = LpipsConfig((StageConfig((4,)), StageConfig((6,), pool=2)))
    params = FunctionalModel(Lpips, small).init(jax.random.key(0))
    monkeypatch.setitem(perceptual.NETWORKS, "alexnet", small)
    monkeypatch.setattr(perceptual, "lpips_params", lambda *_: params)
    monkeypatch.setattr(perceptual, "BATCH_SIZE", 2)
    metric = perceptual.LpipsMetric()
    pixels, other = np.random.default_rng(0).integers(0, 256, (2, 5, 8, 8, 3), dtype=np.uint8)
    single = [metric(pixels[i : i + 1], other[i : i + 1]) for i in range(5)]
    assert metric(pixels, other) == pytest.approx(np.mean(single), rel=1e-5)
    assert metric(pixels, pixels) == pytest.approx(0.0, abs=1e-9)
    assert min(single) > 0
