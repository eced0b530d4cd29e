"""Distortion of 8-bit images."""

import numpy as np

from dar_jax.common.typing import UInt8

MAX_PIXEL = 255.0


def psnr(original: UInt8[np.ndarray, "N H W C"], other: UInt8[np.ndarray, "N H W C"]) -> float:
    """Peak signal-to-noise ratio in dB: the mean over images.

    Identical images count as images that differ by one step in one channel of one pixel.
    """
    error = (original.astype(np.float64) - other.astype(np.float64)) ** 2
    mse = np.maximum(error.mean(axis=(1, 2, 3)), 1.0 / error[0].size)
    return float(np.mean(10 * np.log10(MAX_PIXEL**2 / mse)))
