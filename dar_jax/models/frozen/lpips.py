"""Feature networks of LPIPS, VGG-16 and AlexNet up to their last ReLU, and one weight per channel.

Paper: Zhang et al. 2018, arXiv:1801.03924; weights v0.1. The distance is in `losses.perceptual`.
VGG-16 is the network of the training loss; AlexNet is the one that papers report distances with.

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
class StageConfig:
    """Convolutions with ReLU up to one feature map.

    Attributes:
        widths: channels of each convolution.
        kernel_size: side of the kernels.
        stride: of the convolutions.
        padding: zeros at each border.
        pool: side of the max pooling of stride 2 in front; 0: none.
    """

    widths: tuple[int, ...]
    kernel_size: int = 3
    stride: int = 1
    padding: int = 1
    pool: int = 0


@dataclasses.dataclass(frozen=True)
class LpipsConfig:
    """The stages of the network; features are taken at the end of each. Default: VGG-16."""

    stages: tuple[StageConfig, ...] = (
        StageConfig((64, 64)),
        StageConfig((128, 128), pool=2),
        StageConfig((256, 256, 256), pool=2),
        StageConfig((512, 512, 512), pool=2),
        StageConfig((512, 512, 512), pool=2),
    )


NETWORKS = {
    "vgg16": LpipsConfig(),
    "alexnet": LpipsConfig(
        (
            StageConfig((64,), kernel_size=11, stride=4, padding=2),
            StageConfig((192,), kernel_size=5, padding=2, pool=3),
            StageConfig((384,), pool=3),
            StageConfig((256,)),
            StageConfig((256,)),
        )
    ),
}
"""The networks that have published LPIPS weights."""


class Lpips(nnx.Module):
    """Features of a classifier and LPIPS channel weights."""

    def __init__(self, config: LpipsConfig, *, compute: Compute, rngs: nnx.Rngs):
        self.config = config
        channels = 3
        stages = []
        for stage in config.stages:
            convolutions = []
            for width in stage.widths:
                convolutions.append(_conv(channels, width, stage, compute=compute, rngs=rngs))
                channels = width
            stages.append(nnx.List(convolutions))
        self.stages = nnx.List(stages)
        self.heads = nnx.List([nnx.Param(jnp.ones(stage.widths[-1])) for stage in config.stages])

    def features(self, image: Float[Array, "B H W 3"]) -> tuple[Float[Array, "B _ _ _"], ...]:
        """Activations [B, H_l, W_l, C_l] of each stage l, for images in [-1, 1].

        Raises:
            ValueError: the images are too small.
        """
        x = (image - jnp.array(SHIFT)) / jnp.array(SCALE)
        maps = []
        for stage, convolutions in zip(self.config.stages, self.stages, strict=True):
            if stage.pool:
                x = nnx.max_pool(x, (stage.pool, stage.pool), strides=(2, 2))
            for convolution in convolutions:
                x = jax.nn.relu(convolution(x))
            maps.append(x)
        if 0 in x.shape[1:3]:
            raise ValueError(
                f"images of {image.shape[1]} x {image.shape[2]} pixels are too small for LPIPS: "
                "AlexNet needs 31, VGG-16 16; choose another or none with config.evaluate.lpips, "
                "or config.loss.perceptual_weight=0.0"
            )
        return tuple(maps)

    def weights(self) -> tuple[Float[Array, " _"], ...]:
        """Channel weights of each stage, for `losses.perceptual`."""
        return tuple(head[...] for head in self.heads)


def _conv(
    channels: int, width: int, stage: StageConfig, *, compute: Compute, rngs: nnx.Rngs
) -> nnx.Conv:
    return nnx.Conv(
        channels,
        width,
        (stage.kernel_size, stage.kernel_size),
        strides=stage.stride,
        padding=stage.padding,
        dtype=compute.jnp_dtype,
        rngs=rngs,
    )
