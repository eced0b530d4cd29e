"""Work of the networks in the tokenizer's loss, from their configs alone.

One multiply-add is 2 FLOPs; see `models.dar.work` for what is counted.
"""

from dar_jax.common.image import RGB
from dar_jax.models.dar.work import attention_flops, linear_flops
from dar_jax.models.frozen.dinov2 import MLP_RATIO, Dinov2Config
from dar_jax.models.frozen.lpips import LpipsConfig

LPIPS_FORWARDS = 3
"""The image, the prediction, and the gradient with respect to the prediction alone."""


def lpips_train_flops(config: LpipsConfig, image_size: int) -> int:
    """FLOPs of the distance of one pair of images, and of its gradient."""
    flops, side, channels = 0, image_size, RGB
    for stage in config.stages:
        if stage.pool:
            side = (side - stage.pool) // 2 + 1
        for width in stage.widths:
            side = (side + 2 * stage.padding - stage.kernel_size) // stage.stride + 1
            flops += linear_flops(side**2, stage.kernel_size**2 * channels, width)
            channels = width
    return LPIPS_FORWARDS * flops


def dinov2_flops(config: Dinov2Config) -> int:
    """FLOPs of the features of one image."""
    dim, length = config.dim, 1 + config.num_patches
    block = linear_flops(length, dim, 3 * dim) + linear_flops(length, dim, dim)
    block += linear_flops(length, dim, MLP_RATIO * dim, dim) + attention_flops(length**2, dim)
    patches = linear_flops(config.num_patches, RGB * config.patch_size**2, dim)
    return patches + config.depth * block
