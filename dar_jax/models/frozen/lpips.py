"""Feature network of LPIPS: VGG-16 up to relu5_3 and one weight per channel.

Paper: Zhang et al. 2018, arXiv:1801.03924; weights v0.1. The distance is in `losses.perceptual`.

Difference from the reference: its training script leaves LPIPS in train mode, where a dropout of
0.5 in front of the channel weights is active and makes the distance noisy (two equal calls
differ). Here it is deterministic, as in evaluation mode.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from dar_jax.common.typing import Array, Float
from dar_jax.nn.compute import Compute

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
"""ImageNet mean and deviation for images in [-1, 1], as rounded by the LPIPS authors."""


@dataclasses.dataclass(frozen=True)
class LpipsConfig:
    """Size of the network; the published weights are those of the default, VGG-16.

    Attributes:
        stages: widths of the 3x3 convolutions of each stage; features are taken at the end of a
            stage, and the next one starts by halving the sides.
    """

    stages: tuple[tuple[int, ...], ...] = (
        (64, 64),
        (128, 128),
        (256, 256, 256),
        (512, 512, 512),
        (512, 512, 512),
    )


class Lpips(nnx.Module):
    """VGG features and LPIPS channel weights."""

    def __init__(self, config: LpipsConfig, *, compute: Compute, rngs: nnx.Rngs):
        channels = 3
        stages = []
        for widths in config.stages:
            convolutions = []
            for width in widths:
                convolutions.append(
                    nnx.Conv(channels, width, (3, 3), dtype=compute.jnp_dtype, rngs=rngs)
                )
                channels = width
            stages.append(nnx.List(convolutions))
        self.stages = nnx.List(stages)
        self.heads = nnx.List([nnx.Param(jnp.ones(widths[-1])) for widths in config.stages])

    def features(self, image: Float[Array, "B H W 3"]) -> tuple[Float[Array, "B _ _ _"], ...]:
        """Activations [B, H / 2^l, W / 2^l, C_l] of each stage l, for images in [-1, 1]."""
        x = (image - jnp.array(SHIFT)) / jnp.array(SCALE)
        maps = []
        for stage in self.stages:
            if maps:
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
            for convolution in stage:
                x = jax.nn.relu(convolution(x))
            maps.append(x)
        return tuple(maps)

    def weights(self) -> tuple[Float[Array, " _"], ...]:
        """Channel weights of each stage, for `losses.perceptual`."""
        return tuple(head[...] for head in self.heads)
