"""Structural similarity (Wang et al. 2004, DOI 10.1109/TIP.2003.819861), as its authors define it.

    (2 mu_x mu_y + C1) (2 sigma_xy + C2) / ((mu_x^2 + mu_y^2 + C1) (sigma_x^2 + sigma_y^2 + C2))

Means and covariances are weighted by a Gaussian window of 11 x 11 pixels with deviation 1.5; the
mean is over all places where the window lies within the image, over channels and images. That is
scikit-image's `structural_similarity(..., gaussian_weights=True, sigma=1.5,
use_sample_covariance=False, data_range=255, channel_axis=-1)`. With its default, a uniform 7 x 7
window, figures differ in the second decimal.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.common.typing import Array, Float, UInt8
from dar_jax.losses.distortion import MAX_PIXEL

RADIUS = 5
SIGMA = 1.5
C1 = (0.01 * MAX_PIXEL) ** 2
C2 = (0.03 * MAX_PIXEL) ** 2
BATCH_SIZE = 32


def ssim(original: UInt8[np.ndarray, "N H W C"], other: UInt8[np.ndarray, "N H W C"]) -> float:
    """Mean structural similarity of pairs of images.

    Raises:
        ValueError: the images are smaller than the window.
    """
    width = 2 * RADIUS + 1
    if min(original.shape[1:3]) < width:
        raise ValueError(f"SSIM needs images of {width} pixels a side, got {original.shape[1:3]}")
    sums = [
        np.sum(_similarity(original[i : i + BATCH_SIZE], other[i : i + BATCH_SIZE]), dtype=float)
        for i in range(0, len(original), BATCH_SIZE)
    ]
    return float(sum(sums) / len(original))


@jax.jit
def _similarity(
    original: UInt8[Array, "B H W C"], other: UInt8[Array, "B H W C"]
) -> Float[Array, " B"]:
    """Similarity of each pair."""
    x, y = original.astype(jnp.float32), other.astype(jnp.float32)
    # Variances lose less around the mean; the means get it back.
    centre = jnp.mean(x, axis=(1, 2), keepdims=True)
    x, y = x - centre, y - centre
    mean_x, mean_y, xx, yy, xy = map(_window_mean, (x, y, x * x, y * y, x * y))
    variance = xx - mean_x**2 + yy - mean_y**2
    covariance = xy - mean_x * mean_y
    mean_x, mean_y = mean_x + centre, mean_y + centre
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    return jnp.mean(luminance * (2 * covariance + C2) / (variance + C2), axis=(1, 2, 3))


def _window_mean(x: Float[Array, "B H W C"]) -> Float[Array, "B _ _ C"]:
    rows, columns = (jnp.asarray(_window_matrix(size), jnp.float32) for size in x.shape[1:3])
    precision = jax.lax.Precision.HIGHEST
    return jnp.einsum("bhwc,yh,xw->byxc", x, rows, columns, precision=precision)


def _window_matrix(size: int) -> Float[np.ndarray, "out size"]:
    """The window at every place where it lies within `size` pixels, a row each."""
    offsets = np.arange(-RADIUS, RADIUS + 1)
    window = np.exp(-0.5 * (offsets / SIGMA) ** 2)
    window /= window.sum()
    places = np.arange(size - 2 * RADIUS)[:, None]
    matrix = np.zeros((len(places), size))
    matrix[places, places + np.arange(len(window))] = window
    return matrix
