"""How close reconstructions are to their originals: distortion and perceptual distance."""

import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.common import image as images
from dar_jax.common.typing import Array, Float, Params, UInt8
from dar_jax.evaluation.ssim import ssim
from dar_jax.losses.distortion import psnr
from dar_jax.losses.perceptual import perceptual_distance
from dar_jax.models.frozen.lpips import NETWORKS, Lpips
from dar_jax.models.frozen.pretrained import lpips_params
from dar_jax.nn.functional_model import FunctionalModel

__all__ = ["LpipsMetric", "psnr", "ssim"]

BATCH_SIZE = 32


class LpipsMetric:
    """LPIPS of 8-bit images with the published weights."""

    def __init__(self, network: str = "alexnet", weights: str = ""):
        """Load the network.

        Args:
            network: "alexnet", whose distances papers report, or "vgg16", that of the training
                loss.
            weights: see `pretrained.lpips_params`.

        Raises:
            ValueError: the weights cannot be had; the message says how to get them.
        """
        self._model = FunctionalModel(Lpips, NETWORKS[network])
        self._params = jax.device_put(lpips_params(weights, network, "--config.evaluate.lpips="))

    def __call__(
        self, original: UInt8[np.ndarray, "N H W 3"], other: UInt8[np.ndarray, "N H W 3"]
    ) -> float:
        """Mean distance over pairs of images."""
        distances = [
            _distance(self._model, self._params, *pair)[:count]
            for count, pair in _padded_batches((original, other))
        ]
        return float(jnp.mean(jnp.concatenate(distances)))


def _padded_batches(
    arrays: Iterable[np.ndarray],
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Cut arrays into equal batches, the last one padded: a short one would compile again."""
    arrays = list(arrays)
    size = min(BATCH_SIZE, len(arrays[0]))
    for first in range(0, len(arrays[0]), size):
        parts = [array[first : first + size] for array in arrays]
        missing = size - len(parts[0])
        yield (
            len(parts[0]),
            [np.pad(part, [(0, missing), (0, 0), (0, 0), (0, 0)], "edge") for part in parts],
        )


@functools.partial(jax.jit, static_argnames="model")
def _distance(
    model: FunctionalModel[Lpips], params: Params, original: Array, other: Array
) -> Float[Array, " B"]:
    lpips = model.bind(params)
    a, b = (lpips.features(images.to_float(pixels)) for pixels in (original, other))
    return perceptual_distance(a, b, lpips.weights())
