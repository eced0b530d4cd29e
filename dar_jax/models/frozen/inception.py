"""The Inception network of FID: the graph `inception-2015-12-05` of TensorFlow's model zoo.

Szegedy et al. 2015, arXiv:1512.00567; its use for FID: Heusel et al. 2017, arXiv:1706.08500. 8-bit
images are resized bilinearly to 299 x 299, without antialiasing, in one of two ways:

    tensorflow   as in the graph: pixel i is at i * size / 299 of the source; (x - 128) / 128
    pytorch_fid  as in the package pytorch-fid: at (i + 1/2) * size / 299 - 1/2; 2 (x / 255) - 1

    pool     mean over positions of the last block                           2048: FID, KID, P, R
    spatial  first 7 channels of the graph's `mixed_6/conv`, 17 x 17 x 7     2023: sFID
    logits   pool @ weights, without the bias                                1008: Inception score

`mixed_6/conv` is the 1x1 branch of what the PyTorch port calls Mixed_6d, in the ADM evaluation
suite's order (height, width, channel). Unlike in the later Inception v3, average pooling leaves
out the padding, and the last block has max pooling.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dar_jax.common.typing import Array, Float, UInt8
from dar_jax.nn.compute import Compute

IMAGE_SIZE = 299
SCALES = {"tensorflow": 128.0, "pytorch_fid": 127.5}
"""Half the range of a pixel, by the way in which the network is fed, see the module."""
INPUTS = tuple(SCALES)
BATCH_NORM_EPSILON = 1e-3
SPATIAL_CHANNELS = 7
NUM_LOGITS = 1008


@dataclasses.dataclass(frozen=True)
class ConvConfig:
    """A convolution without bias, batch norm and ReLU; stride 2 has no padding."""

    name: str
    width: int
    kernel_size: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"


@dataclasses.dataclass(frozen=True)
class InceptionBranch:
    """A pooling (or none) and convolutions one after the other.

    Attributes:
        steps: the convolutions; several in one step run side by side, and their outputs are joined.
        pool: see `POOLS`.
    """

    steps: tuple[tuple[ConvConfig, ...], ...] = ()
    pool: str = ""


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Branches whose outputs are joined, in this order."""

    name: str
    branches: tuple[InceptionBranch, ...]


def _average_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    return nnx.avg_pool(x, (3, 3), strides=(1, 1), padding="SAME", count_include_pad=False)


def _max_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    return nnx.max_pool(x, (3, 3), strides=(1, 1), padding="SAME")


def _halve(x: Float[Array, "B H W C"]) -> Float[Array, "B _ _ C"]:
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding="VALID")


POOLS = {"": lambda x: x, "average": _average_pool, "max": _max_pool, "halve": _halve}


def _chain(*convs: ConvConfig) -> InceptionBranch:
    return InceptionBranch(tuple((conv,) for conv in convs))


def _pooled(width: int, pool: str = "average") -> InceptionBranch:
    return InceptionBranch(((ConvConfig("branch_pool", width),),), pool)


def _strided(name: str, width: int) -> ConvConfig:
    return ConvConfig(name, width, (3, 3), 2, "VALID")


def _block_35(name: str, pool_width: int) -> BlockConfig:
    """Block A of the port, at 35 x 35."""
    return BlockConfig(
        name,
        (
            _chain(ConvConfig("branch1x1", 64)),
            _chain(ConvConfig("branch5x5_1", 48), ConvConfig("branch5x5_2", 64, (5, 5))),
            _chain(
                ConvConfig("branch3x3dbl_1", 64),
                ConvConfig("branch3x3dbl_2", 96, (3, 3)),
                ConvConfig("branch3x3dbl_3", 96, (3, 3)),
            ),
            _pooled(pool_width),
        ),
    )


def _block_17(name: str, inner: int) -> BlockConfig:
    """Block C of the port, at 17 x 17: 7 x 7 convolutions as pairs of strips."""
    return BlockConfig(
        name,
        (
            _chain(ConvConfig("branch1x1", 192)),
            _chain(
                ConvConfig("branch7x7_1", inner),
                ConvConfig("branch7x7_2", inner, (1, 7)),
                ConvConfig("branch7x7_3", 192, (7, 1)),
            ),
            _chain(
                ConvConfig("branch7x7dbl_1", inner),
                ConvConfig("branch7x7dbl_2", inner, (7, 1)),
                ConvConfig("branch7x7dbl_3", inner, (1, 7)),
                ConvConfig("branch7x7dbl_4", inner, (7, 1)),
                ConvConfig("branch7x7dbl_5", 192, (1, 7)),
            ),
            _pooled(192),
        ),
    )


def _block_8(name: str, pool: str) -> BlockConfig:
    """Block E of the port, at 8 x 8: two branches end in two strips side by side."""

    def strips(branch: str) -> tuple[ConvConfig, ...]:
        return ConvConfig(f"{branch}a", 384, (1, 3)), ConvConfig(f"{branch}b", 384, (3, 1))

    double = (ConvConfig("branch3x3dbl_1", 448),), (ConvConfig("branch3x3dbl_2", 384, (3, 3)),)
    return BlockConfig(
        name,
        (
            _chain(ConvConfig("branch1x1", 320)),
            InceptionBranch(((ConvConfig("branch3x3_1", 384),), strips("branch3x3_2"))),
            InceptionBranch((*double, strips("branch3x3dbl_3"))),
            _pooled(192, pool),
        ),
    )


TO_17 = BlockConfig(
    "mixed_6a",
    (
        _chain(_strided("branch3x3", 384)),
        _chain(
            ConvConfig("branch3x3dbl_1", 64),
            ConvConfig("branch3x3dbl_2", 96, (3, 3)),
            _strided("branch3x3dbl_3", 96),
        ),
        InceptionBranch(pool="halve"),
    ),
)
TO_8 = BlockConfig(
    "mixed_7a",
    (
        _chain(ConvConfig("branch3x3_1", 192), _strided("branch3x3_2", 320)),
        _chain(
            ConvConfig("branch7x7x3_1", 192),
            ConvConfig("branch7x7x3_2", 192, (1, 7)),
            ConvConfig("branch7x7x3_3", 192, (7, 1)),
            _strided("branch7x7x3_4", 192),
        ),
        InceptionBranch(pool="halve"),
    ),
)


@dataclasses.dataclass(frozen=True)
class InceptionConfig:
    """The layers; the defaults are the published network.

    Attributes:
        stem: convolutions, in two runs; each ends in a max pooling of stride 2.
        blocks: what follows.
        spatial_block: name of the block whose first channels are the spatial features.
    """

    stem: tuple[tuple[ConvConfig, ...], ...] = (
        (
            _strided("conv2d_1a_3x3", 32),
            ConvConfig("conv2d_2a_3x3", 32, (3, 3), padding="VALID"),
            ConvConfig("conv2d_2b_3x3", 64, (3, 3)),
        ),
        (
            ConvConfig("conv2d_3b_1x1", 80),
            ConvConfig("conv2d_4a_3x3", 192, (3, 3), padding="VALID"),
        ),
    )
    blocks: tuple[BlockConfig, ...] = (
        _block_35("mixed_5b", 32),
        _block_35("mixed_5c", 64),
        _block_35("mixed_5d", 64),
        TO_17,
        _block_17("mixed_6b", 128),
        _block_17("mixed_6c", 160),
        _block_17("mixed_6d", 160),
        _block_17("mixed_6e", 192),
        TO_8,
        _block_8("mixed_7b", "average"),
        _block_8("mixed_7c", "max"),
    )
    spatial_block: str = "mixed_6d"

    def conv_names(self) -> Iterator[str]:
        """Yield the path of every convolution in the parameters, e.g. `mixed_5b/branch1x1`."""
        for convs in self.stem:
            yield from (conv.name for conv in convs)
        for block in self.blocks:
            for branch in block.branches:
                yield from (f"{block.name}/{c.name}" for step in branch.steps for c in step)


class InceptionFeatures(NamedTuple):
    """Features of a batch, see the module; float32."""

    pool: Float[Array, "B D"]
    spatial: Float[Array, "B S"]
    logits: Float[Array, "B classes"]


class NormedConv(nnx.Module):
    """Convolution, batch norm with fixed statistics, ReLU."""

    def __init__(self, channels: int, config: ConvConfig, *, compute: Compute, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            channels,
            config.width,
            config.kernel_size,
            strides=config.stride,
            padding=config.padding,
            use_bias=False,
            dtype=compute.jnp_dtype,
            rngs=rngs,
        )
        self.scale = nnx.Param(jnp.ones(config.width))
        self.bias = nnx.Param(jnp.zeros(config.width))
        self.mean = nnx.Param(jnp.zeros(config.width))
        self.variance = nnx.Param(jnp.ones(config.width))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B _ _ _"]:
        scale = self.scale[...] * jax.lax.rsqrt(self.variance[...] + BATCH_NORM_EPSILON)
        return jax.nn.relu((self.conv(x) - self.mean[...]) * scale + self.bias[...])


class Block(nnx.Module):
    """Branches side by side."""

    def __init__(self, channels: int, config: BlockConfig, *, compute: Compute, rngs: nnx.Rngs):
        self.config = config
        self.out_channels = 0
        for branch in config.branches:
            width = channels
            for step in branch.steps:
                for conv in step:
                    setattr(self, conv.name, NormedConv(width, conv, compute=compute, rngs=rngs))
                width = sum(conv.width for conv in step)
            self.out_channels += width

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B _ _ _"]:
        return jnp.concatenate([self._run(branch, x) for branch in self.config.branches], axis=-1)

    def _run(self, branch: InceptionBranch, x: Array) -> Array:
        x = POOLS[branch.pool](x)
        for step in branch.steps:
            x = jnp.concatenate([getattr(self, conv.name)(x) for conv in step], axis=-1)
        return x


class Inception(nnx.Module):
    """8-bit images of any size to the features of FID and its kin."""

    def __init__(self, config: InceptionConfig, *, compute: Compute, rngs: nnx.Rngs):
        self.config = config
        channels = 3
        for convs in config.stem:
            for conv in convs:
                setattr(self, conv.name, NormedConv(channels, conv, compute=compute, rngs=rngs))
                channels = conv.width
        for block_config in config.blocks:
            block = Block(channels, block_config, compute=compute, rngs=rngs)
            setattr(self, block_config.name, block)
            channels = block.out_channels
        self.logits = nnx.Linear(channels, NUM_LOGITS, use_bias=False, rngs=rngs)

    def __call__(
        self, pixels: UInt8[Array, "B H W 3"], fed_as: str = "tensorflow"
    ) -> InceptionFeatures:
        """Compute the features of images that enter as one of `INPUTS`, see the module."""
        half_pixel = fed_as == "pytorch_fid"
        x = resize_bilinear(pixels.astype(jnp.float32), half_pixel=half_pixel)
        x = x / SCALES[fed_as] - 1.0
        for convs in self.config.stem:
            for conv in convs:
                x = getattr(self, conv.name)(x)
            x = _halve(x)
        for block in self.config.blocks:
            x = getattr(self, block.name)(x)
            if block.name == self.config.spatial_block:
                spatial = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
        pool = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        return InceptionFeatures(pool, spatial.astype(jnp.float32), self.logits(pool))


def resize_bilinear(
    image: Float[Array, "B H W C"], size: int = IMAGE_SIZE, *, half_pixel: bool
) -> Float[Array, "B size size C"]:
    """Resize as TensorFlow 1 did: output i samples at i * size_in / size, held at the last pixel.

    With `half_pixel` as PyTorch does, at (i + 1/2) * size_in / size - 1/2, held at both ends; FID
    differs by whole points.
    """
    for axis in (2, 1):
        size_in = image.shape[axis]
        offset = np.float32(half_pixel / 2)
        positions = np.arange(size, dtype=np.float32) + offset
        positions = np.maximum(positions * np.float32(size_in / size) - offset, 0)
        lower = positions.astype(np.int32)
        upper = np.minimum(lower + 1, size_in - 1)
        share = np.expand_dims(positions - lower, tuple(range(1, image.ndim - axis)))
        first, second = (jnp.take(image, index, axis=axis) for index in (lower, upper))
        image = first + (second - first) * share
    return image
