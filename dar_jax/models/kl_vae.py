"""KL-16, the autoencoder whose latents TransDiff models: images to diagonal Gaussians and back.

Architecture of latent diffusion (Rombach et al. 2022, arXiv:2112.10752) with the sizes of MAR
(Li et al. 2024, arXiv:2406.11838), a stride of 16 and 16 channels:

    moments = encode(image)                            [B, H/16, W/16, 2 C]: mean, log-variance
    sample = posterior(moments).sample(noise)
    image = decode(sample)
    latent = latent_scale * sample                     what a flow is trained on

Every part takes images of any size that is a multiple of the stride. The lowest encoder level has
attention whatever the size, as in the reference, which decides it at its nominal 256 pixels.

Difference from the reference: decoding in tiles is not offered: group norms
and attention see the whole image, so that tiles would change it; see `decode` for memory.
"""

import dataclasses
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from dar_jax.common.image import RGB
from dar_jax.common.typing import Array, Float
from dar_jax.nn.attention import Attention
from dar_jax.nn.compute import Compute
from dar_jax.nn.layers import FRAMEWORK_INIT, framework_bias, linear
from dar_jax.nn.layout import in_parts
from dar_jax.nn.linear import Conv, Linear
from dar_jax.nn.stack import rematerialised

LATENT_SCALE = 0.2325
"""1 / deviation of the released VAE's latents over ImageNet, as MAR and TransDiff fix it."""
MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -30.0, 20.0
GROUP_NORM_EPSILON = 1e-6
KERNEL_SIZE = 3


@dataclasses.dataclass(frozen=True)
class KlVaeConfig:
    """Defaults are MAR's KL-16.

    Attributes:
        width: channels at full resolution.
        width_factors: of every level; each but the last ends in halving the resolution.
        num_blocks: residual blocks of an encoder level; a decoder level has one more.
        attention_levels: encoder levels with attention after each residual block.
        latent_channels: C.
        num_groups: of every group norm.
        latent_scale: brings latents to unit variance; a property of the trained weights.
    """

    width: int = 128
    width_factors: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_blocks: int = 2
    attention_levels: tuple[int, ...] = (4,)
    latent_channels: int = 16
    num_groups: int = 32
    latent_scale: float = LATENT_SCALE

    def __post_init__(self):
        for name in ("width", "num_blocks", "latent_channels", "num_groups", "latent_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} {getattr(self, name)} is not positive")
        if not self.width_factors:
            raise ValueError("width_factors is empty; name one factor per level, e.g. (1, 2, 4)")
        for width in self.widths:
            if width < 1 or width % self.num_groups:
                raise ValueError(
                    f"width * width_factors = {self.widths} must be multiples of "
                    f"num_groups={self.num_groups}"
                )
        levels = range(len(self.width_factors))
        if not set(self.attention_levels) <= set(levels):
            raise ValueError(
                f"attention_levels {self.attention_levels} must be levels in 0..{levels[-1]}"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every level, from full resolution down."""
        return tuple(self.width * factor for factor in self.width_factors)

    @property
    def stride(self) -> int:
        """Pixels per latent position along each side."""
        return 2 ** (len(self.width_factors) - 1)

    def latent_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the latent of an image.

        Raises:
            ValueError: the stride does not divide the sides.
        """
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"image of {height}x{width} pixels: both sides must be multiples of the VAE's "
                f"stride {self.stride}"
            )
        return height // self.stride, width // self.stride


class DiagonalGaussian(NamedTuple):
    """The posterior of a latent, float32 [B, h, w, C]; the log-variance is in [-30, 20]."""

    mean: Array
    log_variance: Array

    def mode(self) -> Float[Array, "B h w C"]:
        """Return the most likely latent."""
        return self.mean

    def std(self) -> Float[Array, "B h w C"]:
        """Return the standard deviation."""
        return jnp.exp(0.5 * self.log_variance)

    def sample(self, noise: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """Return the latent that standard normal noise picks."""
        return self.mean + self.std() * noise

    def kl(self) -> Float[Array, " B"]:
        """Divergence from the standard normal in nats, summed over the latent."""
        variance = jnp.exp(self.log_variance)
        terms = jnp.square(self.mean) + variance - 1.0 - self.log_variance
        return 0.5 * jnp.sum(terms, axis=(1, 2, 3))


def posterior(moments: Float[Array, "B h w C2"]) -> DiagonalGaussian:
    """Split what `KlVae.encode` gives and clamp the log-variance."""
    mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return DiagonalGaussian(mean, jnp.clip(log_variance, MIN_LOG_VARIANCE, MAX_LOG_VARIANCE))


class KlVae(nnx.Module):
    """Encoder, decoder, and the pointwise layers between them and the latent."""

    def __init__(self, config: KlVaeConfig, *, compute: Compute, rngs: nnx.Rngs):
        self.config = config
        channels = config.latent_channels
        self.encoder = VaeEncoder(config, compute=compute, rngs=rngs)
        self.to_moments = _pointwise(2 * channels, 2 * channels, compute=compute, rngs=rngs)
        self.from_latent = _pointwise(channels, channels, compute=compute, rngs=rngs)
        self.decoder = VaeDecoder(config, compute=compute, rngs=rngs)

    def encode(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B h w C2"]:
        """Return the moments of images in [-1, 1]: means, then log-variances before clamping.

        Raises:
            ValueError: the stride does not divide the sides.
        """
        self.config.latent_grid(*image.shape[1:3])
        return self.to_moments(self.encoder(image)).astype(jnp.float32)

    def decode(
        self, latent: Float[Array, "B h w C"], *, microbatch: int | None = None
    ) -> Float[Array, "B H W 3"]:
        """Decode posterior samples (unscaled) to images, nominally in [-1, 1] (not clipped).

        Args:
            latent: for what a flow has made, divide by `latent_scale` first.
            microbatch: images decoded at a time, a divisor of B; None is all. At 512 pixels the
                released decoder holds several activations of 134 MB (float32) per image.
        """

        def decode(latent: Array) -> Array:
            return self.decoder(self.from_latent(latent)).astype(jnp.float32)

        return in_parts(decode, microbatch)(latent)


class VaeEncoder(nnx.Module):
    """[B, H, W, 3] to [B, h, w, 2 C]."""

    def __init__(self, config: KlVaeConfig, *, compute: Compute, rngs: nnx.Rngs):
        widths = config.widths
        self.stem = _conv(RGB, config.width, compute=compute, rngs=rngs)
        levels = []
        for number, (dim, out_dim) in enumerate(
            zip((config.width, *widths[:-1]), widths, strict=True)
        ):
            level = Level(
                dim,
                out_dim,
                config.num_blocks,
                attention=number in config.attention_levels,
                resample=Downsample if number < len(widths) - 1 else None,
                num_groups=config.num_groups,
                compute=compute,
                rngs=rngs,
            )
            levels.append(level)
        self.levels = nnx.List(levels)
        self.middle = Middle(widths[-1], config.num_groups, compute=compute, rngs=rngs)
        self.norm = _group_norm(widths[-1], config.num_groups, compute=compute, rngs=rngs)
        self.head = _conv(widths[-1], 2 * config.latent_channels, compute=compute, rngs=rngs)

    def __call__(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B h w C2"]:
        return self.head(jax.nn.silu(self.norm(self.middle(self.descend(image)))))

    def descend(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B h w D"]:
        """Return the features of the lowest level, which the middle blocks take."""
        x = self.stem(image)
        for level in self.levels:
            x = level(x)
        return x


class VaeDecoder(nnx.Module):
    """[B, h, w, C] to [B, H, W, 3]; `levels[l]` has the width of the encoder's, 0 runs last."""

    def __init__(self, config: KlVaeConfig, *, compute: Compute, rngs: nnx.Rngs):
        widths = config.widths
        self.stem = _conv(config.latent_channels, widths[-1], compute=compute, rngs=rngs)
        self.middle = Middle(widths[-1], config.num_groups, compute=compute, rngs=rngs)
        levels = []
        for number, (dim, out_dim) in enumerate(
            zip((*widths[1:], widths[-1]), widths, strict=True)
        ):
            level = Level(
                dim,
                out_dim,
                config.num_blocks + 1,
                resample=Upsample if number > 0 else None,
                num_groups=config.num_groups,
                compute=compute,
                rngs=rngs,
            )
            levels.append(level)
        self.levels = nnx.List(levels)
        self.norm = _group_norm(widths[0], config.num_groups, compute=compute, rngs=rngs)
        self.head = _conv(widths[0], RGB, compute=compute, rngs=rngs)

    def __call__(self, latent: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        x = self.middle(self.stem(latent))
        for level in reversed(self.levels):
            x = level(x)
        return self.head(jax.nn.silu(self.norm(x)))


class Level(nnx.Module):
    """Residual blocks at one resolution, each followed by attention where there is any."""

    def __init__(
        self,
        dim: int,
        out_dim: int,
        num_blocks: int,
        *,
        resample: type["Downsample"] | type["Upsample"] | None,
        num_groups: int,
        attention: bool = False,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        sizes = [(dim, out_dim)] + [(out_dim, out_dim)] * (num_blocks - 1)
        self.residuals = nnx.List(
            [ResidualBlock(*size, num_groups, compute=compute, rngs=rngs) for size in sizes]
        )
        attended = sizes if attention else []
        self.attentions = nnx.List(
            [AttentionBlock(out_dim, num_groups, compute=compute, rngs=rngs) for _ in attended]
        )
        self.resample = None if resample is None else resample(out_dim, compute=compute, rngs=rngs)
        self.remat = compute.remat

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B _ _ _"]:
        run = rematerialised(lambda block, x: block(x), self.remat)
        for number, residual in enumerate(self.residuals):
            x = run(residual, x)
            if self.attentions:
                x = run(self.attentions[number], x)
        return x if self.resample is None else self.resample(x)


class Middle(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, dim: int, num_groups: int, *, compute: Compute, rngs: nnx.Rngs):
        self.first = ResidualBlock(dim, dim, num_groups, compute=compute, rngs=rngs)
        self.attention = AttentionBlock(dim, num_groups, compute=compute, rngs=rngs)
        self.second = ResidualBlock(dim, dim, num_groups, compute=compute, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return self.second(self.attention(self.first(x)))


class ResidualBlock(nnx.Module):
    """Twice group norm, SiLU and convolution, added to the input."""

    def __init__(
        self, dim: int, out_dim: int, num_groups: int, *, compute: Compute, rngs: nnx.Rngs
    ):
        self.norm_1 = _group_norm(dim, num_groups, compute=compute, rngs=rngs)
        self.conv_1 = _conv(dim, out_dim, compute=compute, rngs=rngs)
        self.norm_2 = _group_norm(out_dim, num_groups, compute=compute, rngs=rngs)
        self.conv_2 = _conv(out_dim, out_dim, compute=compute, rngs=rngs)
        same = dim == out_dim
        self.shortcut = None if same else _pointwise(dim, out_dim, compute=compute, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W _"]:
        h = self.conv_1(jax.nn.silu(self.norm_1(x)))
        h = self.conv_2(jax.nn.silu(self.norm_2(h)))
        return h + (x if self.shortcut is None else self.shortcut(x))


class AttentionBlock(nnx.Module):
    """Group norm and single-head attention over all positions, added to the input."""

    def __init__(self, dim: int, num_groups: int, *, compute: Compute, rngs: nnx.Rngs):
        self.norm = _group_norm(dim, num_groups, compute=compute, rngs=rngs)
        self.attention = Attention(dim, 1, kernel_init=FRAMEWORK_INIT, compute=compute, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        tokens = einops.rearrange(self.norm(x), "b h w c -> b (h w) c")
        return x + self.attention(tokens).reshape(x.shape)


class Downsample(nnx.Module):
    """Convolution of stride 2; the zeros are at the bottom and the right only."""

    def __init__(self, dim: int, *, compute: Compute, rngs: nnx.Rngs):
        padding = ((0, 1), (0, 1))
        self.conv = _conv(dim, dim, stride=2, padding=padding, compute=compute, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B _ _ C"]:
        return self.conv(x)


class Upsample(nnx.Module):
    """Every pixel becomes four, then a convolution."""

    def __init__(self, dim: int, *, compute: Compute, rngs: nnx.Rngs):
        self.conv = _conv(dim, dim, compute=compute, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B _ _ C"]:
        return self.conv(einops.repeat(x, "b h w c -> b (h 2) (w 2) c"))


def _conv(
    dim: int,
    out_dim: int,
    *,
    stride: int = 1,
    padding: tuple[tuple[int, int], ...] = ((1, 1), (1, 1)),
    compute: Compute,
    rngs: nnx.Rngs,
) -> Conv:
    return Conv(
        dim,
        out_dim,
        kernel_size=KERNEL_SIZE,
        stride=stride,
        padding=padding,
        kernel_init=FRAMEWORK_INIT,
        bias_init=framework_bias(dim * KERNEL_SIZE**2),
        dtype=compute.jnp_dtype,
        rngs=rngs,
    )


def _pointwise(dim: int, out_dim: int, *, compute: Compute, rngs: nnx.Rngs) -> Linear:
    return linear(dim, out_dim, kernel_init=FRAMEWORK_INIT, compute=compute, rngs=rngs)


def _group_norm(dim: int, num_groups: int, *, compute: Compute, rngs: nnx.Rngs) -> nnx.GroupNorm:
    return nnx.GroupNorm(
        dim,
        num_groups,
        epsilon=GROUP_NORM_EPSILON,
        use_fast_variance=False,  # E[x^2] - E[x]^2 loses what parity needs
        dtype=compute.jnp_dtype,
        rngs=rngs,
    )
