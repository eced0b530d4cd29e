"""The frozen vision transformer DINOv2 with 14-pixel patches (Oquab et al. 2023, arXiv:2304.07193).

    x = [class token, patches] + positions
    x += scale1 * attention(norm1(x));  x += scale2 * mlp(norm2(x))        per block
    features = norm(x)[patches]                                            `x_norm_patchtokens`

Difference from the reference: the position table is that of 224 x 224 pixels; the converter
resamples the published one (518 x 518), as the reference does on every call.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from dar_jax.common.image import resize_bicubic
from dar_jax.common.typing import Array, Float
from dar_jax.nn.attention import Attention
from dar_jax.nn.compute import Compute
from dar_jax.nn.layers import Mlp, affine_layer_norm, linear
from dar_jax.nn.patch import patchify
from dar_jax.nn.stack import Stack
from dar_jax.nn.transformer import exact_gelu

IMAGE_SIZE = 224
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""ImageNet statistics of images in [0, 1]."""
MLP_RATIO = 4
TABLE_INIT = nnx.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class Dinov2Config:
    """Defaults are ViT-B/14's.

    Attributes:
        dim: width, which is that of the features.
        depth: number of blocks.
        num_heads: attention heads.
        patch_size: side of a patch in pixels.
    """

    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    patch_size: int = 14

    @property
    def num_patches(self) -> int:
        return (IMAGE_SIZE // self.patch_size) ** 2


SIZES = {
    "s": Dinov2Config(dim=384, num_heads=6),
    "b": Dinov2Config(),
    "l": Dinov2Config(dim=1024, depth=24, num_heads=16),
}


def preprocess(image: Float[Array, "B H W 3"]) -> Float[Array, "B 224 224 3"]:
    """Standardise images in [-1, 1], then resize them, in this order as the reference does."""
    standardised = ((image + 1.0) / 2.0 - jnp.array(MEAN)) / jnp.array(STD)
    return resize_bicubic(standardised, (IMAGE_SIZE, IMAGE_SIZE))


class Dinov2Block(nnx.Module):
    """Pre-norm transformer block with layer scale."""

    def __init__(self, config: Dinov2Config, *, compute: Compute, rngs: nnx.Rngs):
        dim = config.dim
        self.norm1 = affine_layer_norm(dim, rngs=rngs)
        self.attention = Attention(dim, config.num_heads, compute=compute, rngs=rngs)
        self.scale1 = nnx.Param(jnp.ones(dim))
        self.norm2 = affine_layer_norm(dim, rngs=rngs)
        self.mlp = Mlp(dim, MLP_RATIO * dim, activation=exact_gelu, compute=compute, rngs=rngs)
        self.scale2 = nnx.Param(jnp.ones(dim))

    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        x = x + (self.scale1[...] * self.attention(self.norm1(x))).astype(x.dtype)
        return x + (self.scale2[...] * self.mlp(self.norm2(x))).astype(x.dtype)


class Dinov2(nnx.Module):
    """Vision transformer without register tokens."""

    def __init__(self, config: Dinov2Config, *, compute: Compute, rngs: nnx.Rngs):
        self.config = config
        self.residual_dtype = compute.residual_jnp_dtype
        self.patch_embed = linear(3 * config.patch_size**2, config.dim, compute=compute, rngs=rngs)
        self.class_token = nnx.Param(TABLE_INIT(rngs.params(), (config.dim,)))
        table = TABLE_INIT(rngs.params(), (1 + config.num_patches, config.dim))
        self.position_table = nnx.Param(table)
        self.stack = Stack(
            lambda block_rngs: Dinov2Block(config, compute=compute, rngs=block_rngs),
            config.depth,
            compute=compute,
            rngs=rngs,
        )
        self.norm = affine_layer_norm(config.dim, rngs=rngs)

    def __call__(self, image: Float[Array, "B 224 224 3"]) -> Float[Array, "B N D"]:
        """Normalised patch features of preprocessed images, row by row."""
        patches = self.patch_embed(patchify(image, self.config.patch_size))
        first = jnp.broadcast_to(self.class_token[...], (len(image), 1, self.config.dim))
        x = jnp.concatenate([first, patches], axis=1) + self.position_table[...]
        return self.norm(self.stack(x.astype(self.residual_dtype)))[:, 1:]
