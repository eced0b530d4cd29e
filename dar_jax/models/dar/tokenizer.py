"""The sequential diffusion tokenizer: image -> ordered tokens -> condition -> flow in pixel space.

D-AR (arXiv:2505.23660), section 3; follows the reference's `VQModel`.

    encode:     image -> encoder -> quantizer                    [B, N] indices and their codes
    condition:  codes -> causal layers                           [B, N, D], token i sees codes 0..i
    velocity:   (x_t, t, a window of the condition) -> decoder   [B, H, W, 3]

The N tokens form `num_groups` groups; at unshifted time u the decoder sees the window of
`tokens_per_step` tokens that `window_start` names, so early (noisy) times depend on early tokens
only, and a prefix of the tokens already gives a preview.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from dar_jax.common.typing import Array, Float, Int
from dar_jax.models.dar.decoder import FlowDecoder, FlowDecoderConfig, FlowPrediction
from dar_jax.models.dar.encoder import Encoder, EncoderConfig
from dar_jax.models.dar.llama import cache_mask
from dar_jax.models.dar.quantizer import Quantized, Quantizer, normalized
from dar_jax.nn.attention import KVCache
from dar_jax.nn.compute import Compute
from dar_jax.nn.fused_attention import Causal
from dar_jax.nn.layers import FRAMEWORK_INIT, layer_norm, linear
from dar_jax.nn.stack import Stack
from dar_jax.nn.transformer import TransformerBlock

POSITION_INIT = nnx.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class ConditionConfig:
    """Causal layers between codes and decoder: width, depth (may be 0), head width."""

    dim: int = 768
    depth: int = 8
    head_dim: int = 64


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Defaults are the released tokenizer's (v1, 307M parameters).

    Attributes:
        image_size: side of the images that the model decodes to, in pixels.
        output_size: larger ones are resized to squares of this side in the end; 0: none are.
        num_tokens: N, length of the sequence.
        num_groups: number of groups that the sequence forms.
        tokens_per_step: tokens that condition one step; None means N // num_groups.
        num_steps: denoising steps of the sampler.
        codebook_size: rows of the codebook; 0 is a model without one, whose tokens are unit vectors
            of `code_dim` channels, which no prior draws.
        code_dim: channels of a code.
        max_tokens: rows of the query and position tables, of which the first N are used.
        encoder: image encoder.
        condition: causal layers.
        decoder: flow decoder.
    """

    image_size: int = 256
    output_size: int = 0
    num_tokens: int = 256
    num_groups: int = 8
    tokens_per_step: int | None = None
    num_steps: int = 8
    codebook_size: int = 16384
    code_dim: int = 8
    max_tokens: int = 1024
    encoder: EncoderConfig = EncoderConfig()
    condition: ConditionConfig = ConditionConfig()
    decoder: FlowDecoderConfig = FlowDecoderConfig()

    def __post_init__(self):
        if self.num_tokens > self.max_tokens:
            raise ValueError(
                f"num_tokens={self.num_tokens} must not exceed max_tokens={self.max_tokens}"
            )
        for name, part in (("encoder", self.encoder), ("decoder", self.decoder)):
            if self.image_size % part.patch_size:
                raise ValueError(
                    f"image_size={self.image_size} must be a multiple of "
                    f"{name}.patch_size={part.patch_size}"
                )
        for name in ("encoder", "condition", "decoder"):
            part = getattr(self, name)
            if part.dim % part.head_dim:
                raise ValueError(
                    f"{name}.dim={part.dim} must be a multiple of {name}.head_dim={part.head_dim}"
                )
            if name != "condition" and part.head_dim % 4:
                raise ValueError(
                    f"{name}.head_dim={part.head_dim} must be a multiple of 4: pairs of numbers "
                    "turn with the row, and as many with the column"
                )
        if not 1 <= self.num_groups <= self.num_tokens:
            raise ValueError(
                f"num_groups={self.num_groups} must be from 1 to num_tokens={self.num_tokens}"
            )
        if not 1 <= self.window <= self.num_tokens:
            raise ValueError(
                f"tokens_per_step={self.window} must be from 1 to num_tokens={self.num_tokens}"
            )

    @property
    def window(self) -> int:
        """Tokens that condition one step."""
        return self.tokens_per_step or self.num_tokens // self.num_groups


class Tokenizer(nnx.Module):
    """Encoder, quantizer, causal condition layers and flow decoder."""

    def __init__(self, config: TokenizerConfig, *, rngs: nnx.Rngs, compute: Compute | None = None):
        compute = compute or Compute()
        self.config = config
        self.encoder = Encoder(
            config.encoder,
            num_tokens=config.num_tokens,
            max_tokens=config.max_tokens,
            code_dim=config.code_dim,
            compute=compute,
            rngs=rngs,
        )
        self.quantizer = (
            Quantizer(config.codebook_size, config.code_dim, rngs=rngs)
            if config.codebook_size
            else None
        )
        self.condition_layers = ConditionLayers(
            config.condition,
            code_dim=config.code_dim,
            max_tokens=config.max_tokens,
            compute=compute,
            rngs=rngs,
        )
        self.decoder = FlowDecoder(
            config.decoder, condition_dim=config.condition.dim, compute=compute, rngs=rngs
        )

    def encode(self, image: Float[Array, "B H W 3"]) -> Quantized:
        """Encode images in [-1, 1] to indices [B, N] and their codes."""
        z = self.encoder(image)
        return normalized(z) if self.quantizer is None else self.quantizer(z)

    def condition(self, codes: Float[Array, "B N C"]) -> Float[Array, "B N D"]:
        """Turn codes into condition tokens; token i depends on codes 0 .. i only."""
        return self.condition_layers(codes)

    def condition_from_indices(
        self, indices: Int[Array, "B N"] | Float[Array, "B N C"]
    ) -> Float[Array, "B N D"]:
        """Return the condition tokens of codebook indices, or of codes if there is no codebook."""
        return self.condition(self.codes(indices))

    def codes(self, indices: Int[Array, "B N"] | Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        """Look up codebook indices; codes stay as they are if there is no codebook."""
        return indices if self.quantizer is None else self.quantizer.lookup(indices)

    def velocity(
        self,
        x_t: Float[Array, "B H W 3"],
        t: Float[Array, " B"],
        condition: Float[Array, "B M D"],
        *,
        with_features: bool = False,
    ) -> FlowPrediction:
        """Velocity at (x_t, t), t already shifted, given a window of the condition."""
        return self.decoder(x_t, t, condition, with_features=with_features)


class ConditionLayers(nnx.Module):
    """Codes to condition tokens through a causal transformer without rotary embedding."""

    def __init__(
        self,
        config: ConditionConfig,
        *,
        code_dim: int,
        max_tokens: int,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        self.residual_dtype = compute.residual_jnp_dtype
        self.from_code = linear(
            code_dim,
            config.dim,
            use_bias=False,
            kernel_init=FRAMEWORK_INIT,
            compute=compute,
            rngs=rngs,
        )
        self.position_table = nnx.Param(POSITION_INIT(rngs.params(), (max_tokens, config.dim)))
        self.stack = Stack(
            lambda block_rngs: TransformerBlock(
                config.dim, config.dim // config.head_dim, compute=compute, rngs=block_rngs
            ),
            config.depth,
            compute=compute,
            rngs=rngs,
        )

    def __call__(self, codes: Float[Array, "B N C"]) -> Float[Array, "B N D"]:
        return layer_norm(self.stack(self.embed(codes), mask=Causal()))

    def extend(
        self,
        codes: Float[Array, "B n C"],
        caches: KVCache,
        position: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "B n D"], KVCache]:
        """Run on n codes behind `position` others, whose caches are [B, depth, heads, N, ...]."""
        mask = cache_mask(position, codes.shape[1], caches.keys.shape[3])
        by_layer = jax.tree.map(lambda rows: jnp.swapaxes(rows, 0, 1), caches)
        x, by_layer = self.stack.extend(self.embed(codes, position), by_layer, position, mask)
        return layer_norm(x), jax.tree.map(lambda layers: jnp.swapaxes(layers, 0, 1), by_layer)

    def embed(
        self, codes: Float[Array, "B N C"], position: Int[Array, ""] | int = 0
    ) -> Float[Array, "B N D"]:
        """Project the codes and add the positions, of which the first is `position`."""
        positions = jax.lax.dynamic_slice_in_dim(
            self.position_table[...], position, codes.shape[1], axis=0
        )
        return (self.from_code(codes) + positions).astype(self.residual_dtype)


def window_start(u: Float[Array, " B"], config: TokenizerConfig) -> Int[Array, " B"]:
    """First token of the training window at unshifted times u in [0, 1].

    d = floor(u G + 1/2) / G, start = trunc(d N) in float32, at most N - window: the nearest of
    G + 1 boundaries, so the first group gets half and the last one and a half shares of the draws.
    """
    num_groups, num_tokens = config.num_groups, config.num_tokens
    fraction = jnp.floor(u.astype(jnp.float32) * num_groups + 0.5) / num_groups
    start = jnp.trunc(fraction * num_tokens).astype(jnp.int32)
    return jnp.clip(start, 0, num_tokens - config.window)


def step_starts(config: TokenizerConfig, num_steps: int) -> tuple[int, ...]:
    """First token of the window at each of `num_steps` sampling steps, in double precision."""
    num_groups, num_tokens = config.num_groups, config.num_tokens
    fractions = (
        math.floor(i / num_steps * num_groups + 0.5) / num_groups for i in range(num_steps)
    )
    return tuple(min(num_tokens - config.window, int(f * num_tokens)) for f in fractions)


def select_windows(
    condition: Float[Array, "B N D"], start: Int[Array, " B"], config: TokenizerConfig
) -> Float[Array, "B M D"]:
    """Cut each sample's window out of its condition tokens."""

    def cut(tokens: Array, first: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(tokens, first, config.window)

    return jax.vmap(cut)(condition, start)
