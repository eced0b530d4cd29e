"""Flow-matching pixel decoder: velocity(x_t, t, condition) with per-token adaptive layer norm.

D-AR section 3.2; follows the reference's `SequentialDiffusionDecoder`. The condition tokens of
the current step enter every block through cross-attention, whose output is not added to the
tokens: together with the time embedding it makes the six modulations of *each* image token.
"""

import dataclasses
from typing import NamedTuple

import einops
import jax.numpy as jnp
from flax import nnx

from dar_jax.common.checks import check_positive
from dar_jax.common.image import RGB
from dar_jax.common.typing import Array, Float
from dar_jax.nn.adaln import modulate
from dar_jax.nn.attention import Attention
from dar_jax.nn.compute import Compute
from dar_jax.nn.embeddings import timestep_features
from dar_jax.nn.layers import FRAMEWORK_INIT, Mlp, layer_norm, linear, silu
from dar_jax.nn.linear import Linear
from dar_jax.nn.patch import patchify, unpatchify
from dar_jax.nn.rope import Rope, rope_2d
from dar_jax.nn.stack import Stack
from dar_jax.nn.transformer import MLP_RATIO

NUM_MODULATIONS = 6
FEATURE_GRID = 16
"""Rows of the pooled feature map, as DINOv2 ViT-B/14 has at 224 pixels."""
ZERO_INIT = nnx.initializers.zeros


@dataclasses.dataclass(frozen=True)
class FlowDecoderConfig:
    """Defaults are the released tokenizer's (v1).

    Attributes:
        patch_size: side of a patch in pixels.
        dim: width.
        depth: number of blocks.
        head_dim: width of one attention head.
        data_std: data are images times this.
        time_shift: of the training times and the sampling grid, see `flow.times`.
        rope_base: of the 2-D rotary embedding.
        shared_time: one time embedding for all blocks instead of one for each.
        modulated_head: time-modulated output layer; needs `shared_time`.
        feature_layer: block in front of which the alignment (REPA) features are taken; None
            leaves the head out. At or past `depth` the head exists but gives no features.
        feature_dim: width of the features aligned to (DINOv2 ViT-B: 768).
        feature_hidden_dim: width inside the alignment head.
    """

    patch_size: int = 8
    dim: int = 768
    depth: int = 12
    head_dim: int = 64
    data_std: float = 0.6
    time_shift: float = 2.0
    rope_base: float = 10000.0
    shared_time: bool = False
    modulated_head: bool = False
    feature_layer: int | None = 8
    feature_dim: int = 768
    feature_hidden_dim: int = 2048

    def __post_init__(self):
        check_positive(self, "data_std", "time_shift", "rope_base")
        if self.modulated_head and not self.shared_time:
            raise ValueError("modulated_head=True needs shared_time=True")

    @property
    def gives_features(self) -> bool:
        return self.feature_layer is not None and self.feature_layer < self.depth


class FlowPrediction(NamedTuple):
    """`velocity` float32 [B, H, W, 3]; `features` [B, N, feature_dim] or None."""

    velocity: Array
    features: Array | None


class FlowDecoderBlock(nnx.Module):
    """Self-attention and MLP, both shifted, scaled and gated per token."""

    def __init__(self, config: FlowDecoderConfig, *, compute: Compute, rngs: nnx.Rngs):
        dim, num_heads = config.dim, config.dim // config.head_dim
        self.time_embed = None if config.shared_time else Mlp(dim, dim, compute=compute, rngs=rngs)
        self.condition_mlp = Mlp(dim, dim, compute=compute, rngs=rngs)
        self.cross_attention = Attention(dim, num_heads, qk_norm=True, compute=compute, rngs=rngs)
        self.modulation = linear(
            dim, NUM_MODULATIONS * dim, kernel_init=ZERO_INIT, compute=compute, rngs=rngs
        )
        self.attention = Attention(dim, num_heads, qk_norm=True, compute=compute, rngs=rngs)
        self.mlp = Mlp(dim, MLP_RATIO * dim, compute=compute, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B N D"],
        time: Float[Array, "B D"],
        condition: Float[Array, "B M D"],
        rope: Rope,
    ) -> Float[Array, "B N D"]:
        """Apply the block.

        Args:
            x: image tokens.
            time: timestep features, or their shared embedding.
            condition: projected and normalised condition tokens of this step.
            rope: of the image tokens.
        """
        attended = self.attend_condition(x, condition, rope)
        modulation = self.modulation(silu(self.embed_time(time)[:, None] + attended))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(
            modulation, NUM_MODULATIONS, axis=-1
        )
        h = modulate(layer_norm(x), shift_a, scale_a)
        x = x + gate_a * self.attention(h, query_rope=rope, key_rope=rope)
        return x + gate_m * self.mlp(modulate(layer_norm(x), shift_m, scale_m))

    def embed_time(self, time: Float[Array, "B D"]) -> Float[Array, "B D"]:
        """Return the block's time embedding."""
        return time if self.time_embed is None else self.time_embed(time)

    def attend_condition(
        self, x: Float[Array, "B N D"], condition: Float[Array, "B M D"], rope: Rope
    ) -> Float[Array, "B N D"]:
        """Cross-attention; only the queries are rotated."""
        context = layer_norm(self.condition_mlp(condition))
        return self.cross_attention(layer_norm(x), context, query_rope=rope)


class ModulatedHead(nnx.Module):
    """Output layer whose input is normalised once more and modulated by the time."""

    def __init__(self, dim: int, out_dim: int, *, compute: Compute, rngs: nnx.Rngs):
        self.modulation = linear(dim, 2 * dim, kernel_init=ZERO_INIT, compute=compute, rngs=rngs)
        self.out = linear(dim, out_dim, kernel_init=ZERO_INIT, compute=compute, rngs=rngs)

    def __call__(self, x: Float[Array, "B N D"], time: Float[Array, "B D"]) -> Array:
        shift, scale = jnp.split(self.modulation(silu(time))[:, None], 2, axis=-1)
        return self.out(modulate(layer_norm(x), shift, scale))


class AlignmentHead(nnx.Module):
    """Three-layer MLP from decoder tokens to the features of a vision model (REPA)."""

    def __init__(self, config: FlowDecoderConfig, *, compute: Compute, rngs: nnx.Rngs):
        widths = (config.dim, *[config.feature_hidden_dim] * 2, config.feature_dim)
        self.layer1, self.layer2, self.layer3 = (
            linear(*pair, kernel_init=FRAMEWORK_INIT, compute=compute, rngs=rngs)
            for pair in zip(widths, widths[1:], strict=False)
        )

    def __call__(self, x: Float[Array, "B N D"], grid: tuple[int, int]) -> Float[Array, "B M F"]:
        """Average-pool the token grid to about 16 rows and project.

        Raises:
            ValueError: the grid has fewer than 16 rows.
        """
        stride = grid[0] // FEATURE_GRID
        if stride == 0:
            raise ValueError(
                f"alignment features need at least {FEATURE_GRID} rows of patches, got {grid[0]}: "
                f"use larger images, smaller patches or decoder.feature_layer=None"
            )
        rows, columns = (side // stride for side in grid)
        x = einops.rearrange(x, "b (h w) d -> b h w d", h=grid[0])
        x = x[:, : rows * stride, : columns * stride]
        x = einops.reduce(x, "b (h s1) (w s2) d -> b (h w) d", "mean", s1=stride, s2=stride)
        return self.layer3(silu(self.layer2(silu(self.layer1(x)))))


class FlowDecoder(nnx.Module):
    """Velocity field in pixel space."""

    def __init__(
        self, config: FlowDecoderConfig, *, condition_dim: int, compute: Compute, rngs: nnx.Rngs
    ):
        self.config = config
        dim, pixels = config.dim, RGB * config.patch_size**2

        def framework_linear(features_in: int, features_out: int) -> Linear:
            return linear(
                features_in, features_out, kernel_init=FRAMEWORK_INIT, compute=compute, rngs=rngs
            )

        self.condition_projection = framework_linear(condition_dim, dim)
        self.patch_embed = framework_linear(pixels, dim)
        self.time_embed = (
            Mlp(dim, dim, kernel_init=FRAMEWORK_INIT, compute=compute, rngs=rngs)
            if config.shared_time
            else None
        )
        self.stack = Stack(
            lambda block_rngs: FlowDecoderBlock(config, compute=compute, rngs=block_rngs),
            config.depth,
            compute=compute,
            rngs=rngs,
        )
        self.head = (
            ModulatedHead(dim, pixels, compute=compute, rngs=rngs)
            if config.modulated_head
            else linear(dim, pixels, kernel_init=ZERO_INIT, compute=compute, rngs=rngs)
        )
        self.alignment_head = (
            None
            if config.feature_layer is None
            else AlignmentHead(config, compute=compute, rngs=rngs)
        )

    def __call__(
        self,
        x_t: Float[Array, "B H W 3"],
        t: Float[Array, " B"],
        condition: Float[Array, "B M C"],
        *,
        with_features: bool = False,
    ) -> FlowPrediction:
        """Predict the velocity at (x_t, t).

        Args:
            x_t: noisy image, float32, in data units (images times `data_std`).
            t: times in [0, 1], already shifted.
            condition: condition tokens of the step.
            with_features: also return the alignment features, if the model has any.
        """
        patch = self.config.patch_size
        grid = (x_t.shape[1] // patch, x_t.shape[2] // patch)
        rope = rope_2d(*grid, self.config.head_dim, self.config.rope_base)
        inputs = (self.embed_time(t), layer_norm(self.condition_projection(condition)), rope)
        x = self.patch_embed(patchify(x_t, patch))
        features, layer = None, self.config.feature_layer
        wanted = with_features and self.config.gives_features
        if wanted and layer is not None and self.alignment_head is not None:
            x = self.stack(x, *inputs, stop=layer)
            features = self.alignment_head(x, grid)
            x = self.stack(x, *inputs, start=layer)
        else:
            x = self.stack(x, *inputs)
        x = layer_norm(x)
        out = self.head(x, inputs[0]) if isinstance(self.head, ModulatedHead) else self.head(x)
        velocity = unpatchify(out.astype(jnp.float32), patch, grid)
        return FlowPrediction(velocity, features)

    def embed_time(self, t: Float[Array, " B"]) -> Float[Array, "B D"]:
        """Timestep features, embedded once where all blocks share the embedding."""
        features = timestep_features(t, self.config.dim)
        return features if self.time_embed is None else self.time_embed(features)
