"""Time-conditioned PatchGAN discriminator of D-AR's adversarial loss.

PatchGAN (Isola et al. 2017, arXiv:1611.07004) whose norms are GroupNorm modulated by time:

    y = norm(x) (1 + gamma) + beta,      (gamma, beta) = linear(features(t))

Difference from the reference: its loss calls the discriminator without `t`, which fails, so no
released model was trained with it; here it works as it was meant.
"""

import dataclasses

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from dar_jax.common.typing import Array, Float
from dar_jax.nn.compute import Compute
from dar_jax.nn.embeddings import timestep_features
from dar_jax.nn.layers import framework_bias, linear
from dar_jax.nn.linear import Conv

KERNEL_SIZE = 4
TIME_FEATURES = 256
NUM_GROUPS = 16
GROUP_NORM_EPSILON = 1e-5
LEAK = 0.2
MAX_WIDTH_FACTOR = 8
CONV_INIT = nnx.initializers.normal(0.02)
TIME_INIT = nnx.initializers.normal(0.01)


@dataclasses.dataclass(frozen=True)
class PatchGanConfig:
    """Sizes of the discriminator.

    Attributes:
        width: channels of the first convolution; doubled by each layer, at most eightfold.
        num_layers: normalised convolutions, all but the last with stride 2.
    """

    width: int = 128
    num_layers: int = 3

    def __post_init__(self):
        # A normalised layer has at least twice the first width.
        if self.width < 1 or 2 * self.width % NUM_GROUPS:
            raise ValueError(f"width {self.width} must be a multiple of {NUM_GROUPS // 2}")
        if self.num_layers < 1:
            raise ValueError(f"num_layers {self.num_layers} must be at least 1")


class ModulatedNorm(nnx.Module):
    """GroupNorm without parameters, scaled and shifted by time."""

    def __init__(self, dim: int, *, compute: Compute, rngs: nnx.Rngs):
        self.norm = nnx.GroupNorm(
            dim,
            NUM_GROUPS,
            epsilon=GROUP_NORM_EPSILON,
            use_bias=False,
            use_scale=False,
            use_fast_variance=False,  # E[x^2] - E[x]^2 loses what parity needs
            dtype=compute.jnp_dtype,
            rngs=rngs,
        )
        self.modulation = linear(
            TIME_FEATURES, 2 * dim, kernel_init=TIME_INIT, compute=compute, rngs=rngs
        )

    def __call__(
        self, x: Float[Array, "B H W C"], time: Float[Array, "B F"]
    ) -> Float[Array, "B H W C"]:
        gamma, beta = einops.rearrange(self.modulation(time), "b (two c) -> two b 1 1 c", two=2)
        return self.norm(x) * (1.0 + gamma) + beta


class Layer(nnx.Module):
    """Convolution without bias, modulated norm, leaky ReLU."""

    def __init__(self, dim: int, out_dim: int, stride: int, *, compute: Compute, rngs: nnx.Rngs):
        self.conv = _conv(dim, out_dim, stride, use_bias=False, compute=compute, rngs=rngs)
        self.norm = ModulatedNorm(out_dim, compute=compute, rngs=rngs)

    def normalised(
        self, x: Float[Array, "B H W C"], time: Float[Array, "B F"]
    ) -> Float[Array, "B _ _ _"]:
        """Output before the activation."""
        return self.norm(self.conv(x), time)

    def __call__(
        self, x: Float[Array, "B H W C"], time: Float[Array, "B F"]
    ) -> Float[Array, "B _ _ _"]:
        return jax.nn.leaky_relu(self.normalised(x, time), LEAK)


class PatchGan(nnx.Module):
    """Logits of overlapping patches: is this real, given the time it was predicted at?"""

    def __init__(self, config: PatchGanConfig, *, compute: Compute, rngs: nnx.Rngs):
        factors = [min(2**n, MAX_WIDTH_FACTOR) for n in range(config.num_layers + 1)]
        widths = [config.width * factor for factor in factors]
        strides = [2] * (config.num_layers - 1) + [1]
        self.stem = _conv(3, widths[0], 2, compute=compute, rngs=rngs)
        self.layers = nnx.List(
            [
                Layer(dim, out_dim, stride, compute=compute, rngs=rngs)
                for dim, out_dim, stride in zip(widths[:-1], widths[1:], strides, strict=True)
            ]
        )
        self.head = _conv(widths[-1], 1, 1, compute=compute, rngs=rngs)

    def __call__(
        self, image: Float[Array, "B H W 3"], t: Float[Array, " B"]
    ) -> Float[Array, "B h w"]:
        """Logits of images in [-1, 1] at times in [0, 1], float32.

        Raises:
            ValueError: the images are too small for so many layers.
        """
        time = timestep_features(t, TIME_FEATURES)
        x = self.embed(image)
        for layer in self.layers:
            x = layer(x, time)
        logits = self.head(x)[..., 0].astype(jnp.float32)
        if 0 in logits.shape[1:]:
            raise ValueError(
                f"images of {image.shape[1]} x {image.shape[2]} pixels are too small for a "
                f"discriminator of num_layers={len(self.layers)}: nothing is left of them"
            )
        return logits

    def embed(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B _ _ _"]:
        """First convolution and activation."""
        return jax.nn.leaky_relu(self.stem(image), LEAK)


def _conv(
    dim: int,
    out_dim: int,
    stride: int,
    *,
    use_bias: bool = True,
    compute: Compute,
    rngs: nnx.Rngs,
) -> Conv:
    return Conv(
        dim,
        out_dim,
        kernel_size=KERNEL_SIZE,
        stride=stride,
        padding=((1, 1), (1, 1)),
        use_bias=use_bias,
        kernel_init=CONV_INIT,
        bias_init=framework_bias(dim * KERNEL_SIZE**2),
        dtype=compute.jnp_dtype,
        rngs=rngs,
    )
