"""Structural similarity against its definition, and against scikit-image's."""

import numpy as np
import pytest

from dar_jax.evaluation import ssim as module
from dar_jax.evaluation.ssim import ssim

TOLERANCE = 1e-5  # float32


def pair(size=(17, 14), count=3):
    rng = np.random.default_rng(0)
    smooth = np.cumsum(rng.normal(0, 9, (count, *size, 3)), axis=1) + 128
    noisy = smooth + rng.normal(0, 12, smooth.shape)
    return tuple(np.clip(x, 0, 255).astype(np.uint8) for x in (smooth, noisy))


def window_similarity(x, y):
    """Similarity of one channel under one window."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    mean_x, mean_y = np.sum(window * x), np.sum(window * y)
    variances = np.sum(window * (x - mean_x) ** 2) + np.sum(window * (y - mean_y) ** 2)
    covariance = np.sum(window * (x - mean_x) * (y - mean_y))
    c1, c2 = 2.55**2, 7.65**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance * (2 * covariance + c2) / (variances + c2)


def test_ssim_equals_definition(monkeypatch):
    monkeypatch.setattr(module, "BATCH_SIZE", 2)
    x, y = pair()
    expected = np.mean(
        [
            window_similarity(*(z[n, i : i + 11, j : j + 11, c].astype(float) for z in (x, y)))
            for n, i, j, c in np.ndindex(3, 7, 4, 3)
        ]
    )
    assert 0.1 < expected < 0.9
    assert ssim(x, y) == pytest.approx(expected, abs=TOLERANCE)


def test_ssim_of_equal_images_is_one_and_needs_room_for_its_window():
    x, _ = pair()
    assert ssim(x, x) == pytest.approx(1, abs=TOLERANCE)
    with pytest.raises(ValueError, match=r"11 pixels a side, got \(10, 14\)"):
        ssim(x[:, :10], x[:, :10])


@pytest.mark.slow  # scikit-image is a large import, and optional
def test_ssim_and_psnr_equal_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    from dar_jax.losses.distortion import psnr

    pairs = pair((64, 48))
    settings = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1)
    expected = [
        metrics.structural_similarity(x, y, **settings) for x, y in zip(*pairs, strict=True)
    ]
    assert ssim(*pairs) == pytest.approx(np.mean(expected), abs=TOLERANCE)
    expected = [metrics.peak_signal_noise_ratio(x, y) for x, y in zip(*pairs, strict=True)]
    assert psnr(*pairs) == pytest.approx(np.mean(expected), rel=1e-10)
