"""The D-AR prior: a Llama decoder over image tokens behind a class or caption condition.

Follows the reference's (LlamaGen, arXiv:2406.06525) `Transformer` with 1-D rotary embedding:
pre-norm blocks of RMSNorm, causal attention with interleaved RoPE and SwiGLU, no biases, untied
output. The sequence is [condition tokens, image tokens]; position 0 is the first condition token,
and the logits at position T - 1 + i predict image token i. DropPath, zero in the released recipe,
is left out.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from dar_jax.common.checks import check_positive, check_rates
from dar_jax.common.typing import Any, Array, Bool, Float, Int, PRNGKeyArray
from dar_jax.models.dar.decoding import DecodingBlock, Position, heads_together, positions_of
from dar_jax.nn.attention import Attention, KVCache, Mask
from dar_jax.nn.compute import Compute
from dar_jax.nn.embeddings import timestep_features
from dar_jax.nn.fused_attention import Causal
from dar_jax.nn.int8 import quantize
from dar_jax.nn.layers import SwiGlu, dropout, linear, rms_norm, silu
from dar_jax.nn.layout import keep_batch_split
from dar_jax.nn.rope import Rope, rope_1d
from dar_jax.nn.stack import Stack

INIT = nnx.initializers.normal(0.02)
KERNEL_HEAD_DIMS, KERNEL_WIDTHS, KERNEL_TOKENS = (16, 32, 64, 128), 128, 16
"""What `nn.decode_kernels` takes."""
SHARED = ("vocab_size", "num_tokens", "num_classes", "caption_dim", "condition_tokens")
"""Fields of `LlamaConfig` that say which tokens and conditions a prior is of."""


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Defaults are D-AR-L's (343M parameters).

    Attributes:
        num_layers: number of blocks.
        num_heads: query heads.
        num_kv_heads: key/value heads; None means num_heads.
        dim: width.
        ffn_dim: hidden width of SwiGLU; see `ffn_hidden_dim`.
        vocab_size: codebook size of the tokenizer.
        num_tokens: image tokens N.
        num_classes: class labels; the label `num_classes` is the null class. 0, in a config file
            only, stands for the number of classes of the data.
        caption_dim: width of caption features; None conditions on class labels.
        text_encoder: what makes features of texts, see `models.text.encoder`; "": they are given.
        text_digest: of that encoder, as training found it; "": any will do.
        condition_tokens: T, tokens in front of the image tokens.
        norm_epsilon: of the RMS norms.
        rope_base: of the rotary embedding.
        token_dropout: on the embedded condition and image tokens.
        residual_dropout: on the outputs of attention and SwiGLU.
        label_dropout: probability of training on the null condition.
        max_guidance: the guidance scale of every token is an input, up to this one, and logits are
            guided ones: a distilled prior, which needs no unconditional rows. 0: it is none.
    """

    num_layers: int = 24
    num_heads: int = 16
    num_kv_heads: int | None = None
    dim: int = 1024
    ffn_dim: int = 2816
    vocab_size: int = 16384
    num_tokens: int = 256
    num_classes: int = 1000
    caption_dim: int | None = None
    text_encoder: str = ""
    text_digest: str = ""
    condition_tokens: int = 1
    norm_epsilon: float = 1e-5
    rope_base: float = 10000.0
    token_dropout: float = 0.1
    residual_dropout: float = 0.1
    label_dropout: float = 0.1
    max_guidance: float = 0.0

    def __post_init__(self):
        check_rates(self, "token_dropout", "residual_dropout")
        check_positive(self, "norm_epsilon", "rope_base")
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"label_dropout={self.label_dropout} must be in [0, 1]")
        if self.caption_dim is None and self.condition_tokens != 1:
            raise ValueError(
                f"condition_tokens={self.condition_tokens} must be 1, for a class label, unless "
                "caption_dim says how wide captions are"
            )
        if self.max_guidance and self.dim % 2:
            raise ValueError(f"dim={self.dim} must be even where max_guidance is an input")
        if self.dim % self.num_heads:
            raise ValueError(f"dim={self.dim} must be a multiple of num_heads={self.num_heads}")
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if not (self.max_guidance == 0 or 1 < self.max_guidance < math.inf):
            raise ValueError(
                f"max_guidance={self.max_guidance} must be above 1, which is no guidance, and "
                "finite; or 0, for a prior that is not distilled"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


def ffn_hidden_dim(dim: int, multiple_of: int = 256, multiplier: float | None = None) -> int:
    """Llama's rule: 2/3 of 4 dim, times an optional multiplier, rounded up to a multiple."""
    hidden = int(8 * dim / 3)
    hidden = hidden if multiplier is None else int(multiplier * hidden)
    return -(-hidden // multiple_of) * multiple_of


def _size(num_layers: int, num_heads: int, dim: int) -> dict[str, Any]:
    return dict(num_layers=num_layers, num_heads=num_heads, dim=dim, ffn_dim=ffn_hidden_dim(dim))


SIZES = {
    "b": _size(12, 12, 768),
    "l": _size(24, 16, 1024),
    "xl": _size(36, 20, 1280),
    "xxl": _size(48, 24, 1536),
    "xxxl": _size(48, 40, 2560),
    "1b": _size(22, 32, 2048),
    "3b": _size(24, 32, 3200),
    "7b": _size(32, 32, 4096),
}
"""Named sizes of the reference."""


class LlamaBlock(nnx.Module):
    """`x += attention(norm(x)); x += swiglu(norm(x))`."""

    def __init__(self, config: LlamaConfig, *, compute: Compute, rngs: nnx.Rngs):
        norm: dict[str, Any] = dict(epsilon=config.norm_epsilon, rngs=rngs)
        self.residual_dropout = config.residual_dropout
        self.attention_norm = rms_norm(config.dim, **norm)
        self.attention = Attention(
            config.dim,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            use_bias=False,
            kernel_init=INIT,
            compute=compute,
            rngs=rngs,
        )
        self.ffn_norm = rms_norm(config.dim, **norm)
        self.ffn = SwiGlu(config.dim, config.ffn_dim, kernel_init=INIT, compute=compute, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B N D"],
        rope: Rope,
        mask: Mask,
        *,
        rng: PRNGKeyArray | None = None,
    ) -> Float[Array, "B N D"]:
        """Run on a whole sequence; a key turns dropout on."""
        rng1, rng2 = (None, None) if rng is None else jax.random.split(rng)
        attended = self.attention(self.attention_norm(x), query_rope=rope, key_rope=rope, mask=mask)
        x = x + dropout(attended, self.residual_dropout, rng1)
        return x + dropout(self.ffn(self.ffn_norm(x)), self.residual_dropout, rng2)


class CaptionProjection(nnx.Module):
    """Caption features to condition tokens; `null_caption` is fixed, not trained."""

    def __init__(self, caption_dim: int, config: LlamaConfig, *, compute: Compute, rngs: nnx.Rngs):
        shape = (config.condition_tokens, caption_dim)
        self.null_caption = nnx.Param(
            nnx.initializers.normal(caption_dim**-0.5)(rngs.params(), shape)
        )
        bias_free: dict[str, Any] = dict(
            use_bias=False, kernel_init=INIT, compute=compute, rngs=rngs
        )
        self.hidden = linear(caption_dim, config.dim, **bias_free)
        self.out = linear(config.dim, config.dim, **bias_free)

    def __call__(self, captions: Float[Array, "B T F"]) -> Float[Array, "B T D"]:
        hidden = self.hidden(captions).astype(jnp.float32)
        return self.out(jax.nn.gelu(hidden, approximate=True))

    def null(self) -> Float[Array, "T F"]:
        return jax.lax.stop_gradient(self.null_caption[...])


class GuidanceEmbed(nnx.Module):
    """Guidance scales to what is added to the inputs, which is nothing before it is trained."""

    def __init__(self, config: LlamaConfig, *, compute: Compute, rngs: nnx.Rngs):
        layer = functools.partial(linear, config.dim, config.dim, compute=compute, rngs=rngs)
        self.dim = config.dim
        self.hidden = layer(kernel_init=INIT)
        self.out = layer(kernel_init=nnx.initializers.zeros, result_dtype=jnp.float32)

    def __call__(self, scales: Float[Array, "*positions"]) -> Float[Array, "*positions D"]:
        scales = jnp.asarray(scales, jnp.float32)
        features = timestep_features((scales / (1 + scales)).reshape(-1), self.dim)
        return self.out(silu(self.hidden(features))).reshape(*scales.shape, -1)


class Llama(nnx.Module):
    """Autoregressive transformer over image tokens."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, compute: Compute | None = None):
        self.compute = compute = compute or Compute()
        self.config = config
        table = functools.partial(nnx.Embed, dtype=jnp.float32, embedding_init=INIT, rngs=rngs)
        if config.caption_dim is None:
            self.condition_embed = table(config.num_classes + 1, config.dim)
        else:
            self.condition_embed = CaptionProjection(
                config.caption_dim, config, compute=compute, rngs=rngs
            )
        self.token_embed = table(config.vocab_size, config.dim)
        if config.max_guidance:
            self.guidance_embed = GuidanceEmbed(config, compute=compute, rngs=rngs)
        block = LlamaBlock if compute.stacked else DecodingBlock
        self.stack = Stack(
            lambda block_rngs: block(config, compute=compute, rngs=block_rngs),
            config.num_layers,
            compute=compute,
            rngs=rngs,
        )
        self.norm = rms_norm(config.dim, epsilon=config.norm_epsilon, rngs=rngs)
        self.output = linear(
            config.dim,
            config.vocab_size,
            use_bias=False,
            kernel_init=nnx.initializers.zeros,
            result_dtype=jnp.float32,
            compute=compute,
            rngs=rngs,
        )

    def embed_condition(
        self, condition: Int[Array, " B"] | Float[Array, "B T F"]
    ) -> Float[Array, "B T D"]:
        """Embed labels [B] in 0 .. num_classes (the null class), or captions [B, T, F]."""
        if self.config.caption_dim is None:
            return self.condition_embed(condition)[:, None]
        return self.condition_embed(condition).astype(jnp.float32)

    def null_condition(self, batch_size: int) -> Array:
        """Return `batch_size` null labels, or null captions."""
        if isinstance(self.condition_embed, nnx.Embed):
            return jnp.full((batch_size,), self.config.num_classes, jnp.int32)
        null = self.condition_embed.null()
        return jnp.broadcast_to(null, (batch_size, *null.shape))

    def drop_condition(self, condition: Array, draws: Float[Array, " B"]) -> Array:
        """Replace the conditions whose uniform draw is below `label_dropout` by the null one."""
        null = self.null_condition(len(condition)).astype(condition.dtype)
        dropped = (draws < self.config.label_dropout).reshape(-1, *(1,) * (condition.ndim - 1))
        return jnp.where(dropped, null, condition)

    def logits(
        self,
        condition: Int[Array, " B"] | Float[Array, "B T F"],
        indices: Int[Array, "B N"],
        *,
        mask: Bool[Array, "B S S"] | None = None,
        rng: PRNGKeyArray | None = None,
    ) -> Float[Array, "B S V"]:
        """Teacher-forced logits at all S = T + N positions, float32; arguments as of `hidden`."""
        return self.head(self.hidden(condition, indices, mask=mask, rng=rng))

    def hidden(
        self,
        condition: Int[Array, " B"] | Float[Array, "B T F"],
        indices: Int[Array, "B N"],
        *,
        mask: Bool[Array, "B S S"] | None = None,
        scales: Float[Array, "B M"] | None = None,
        rng: PRNGKeyArray | None = None,
    ) -> Float[Array, "B S D"]:
        """Run all S = T + N positions up to the output layer.

        Args:
            condition: labels or captions.
            indices: image tokens.
            mask: True may attend; None is causal.
            scales: guidance of the M = N + 1 tokens that are predicted, where it is an input; None
                is no guidance.
            rng: turns dropout on.
        """
        rng_tokens, rng_blocks = (None, None) if rng is None else jax.random.split(rng)
        x = jnp.concatenate([self.embed_condition(condition), self.token_embed(indices)], axis=1)
        if self.config.max_guidance:
            scales = jnp.ones((len(x), indices.shape[1] + 1)) if scales is None else scales
            x = x.at[:, self.config.condition_tokens - 1 :].add(self.guidance_embed(scales))
        x = dropout(x, self.config.token_dropout, rng_tokens)
        x = x.astype(self.compute.residual_jnp_dtype)
        length = x.shape[1]
        where = Causal() if mask is None else mask[:, None]
        return self.norm(self.stack(x, self.rope()[:length], where, rng=rng_blocks))

    def head(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Return the float32 logits of normalised positions."""
        return keep_batch_split(self.output(hidden))

    def rope(self) -> Rope:
        """Table of all positions of the sequence."""
        length = self.config.condition_tokens + self.config.num_tokens
        return rope_1d(length, self.config.head_dim, self.config.rope_base)

    def empty_caches(self, batch_size: int) -> tuple[KVCache, ...]:
        """One cache of no slots per layer, whose rows hold one or more heads."""
        heads, head_dim = self.config.num_kv_heads or self.config.num_heads, self.config.head_dim
        together = heads_together(head_dim, heads)
        shape = (batch_size, heads // together, 0, head_dim * together)
        empty = jnp.zeros(shape, self.compute.jnp_dtype)
        if self.compute.decode_cache == "int8":
            empty = quantize(empty, axis=-1)
        return (KVCache(empty, empty),) * self.config.num_layers

    def extend(
        self,
        x: Float[Array, "B N D"],
        caches: tuple[KVCache, ...],
        position: Position,
        key_mask: Bool[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B N D"], tuple[KVCache, ...]]:
        """Run N embedded tokens at `position`; return what `head` takes, and the caches.

        Needs a model with unstacked layers (`Compute(stacked=False)`), whose parameters are
        `decoding.decoding_params`.

        Args:
            x: embedded tokens.
            caches: one per layer, with M slots of which the first `position` are filled.
            position: of the first new token, counted from the first condition token; one for all
                rows, or one of each.
            key_mask: False for slots that no other token may attend to (padded captions).
        """
        num_new, num_slots = x.shape[1], caches[0].keys.shape[2]
        mask, rope = None, self.rope()
        if key_mask is not None or not has_kernels(self.config, self.compute, num_new):
            mask = cache_mask(position, num_new, num_slots, key_mask)
            rope = rope[positions_of(position, num_new)]
        extended, x = [], x.astype(self.compute.residual_jnp_dtype)
        for block, cache in zip(self.stack.blocks, caches, strict=True):
            x, cache = block.extend(x, cache, position, rope, mask)
            extended.append(cache)
        return self.norm(x), tuple(extended)


def has_kernels(config: LlamaConfig, compute: Compute, num_new: int) -> bool:
    """Whether `nn.decode_kernels` runs so many new tokens of a row, if all slots may be seen."""
    return (
        compute.decoding == "pallas"
        and config.dim % KERNEL_WIDTHS == config.ffn_dim % KERNEL_WIDTHS == 0
        and config.num_kv_heads in (None, config.num_heads)
        and config.head_dim in KERNEL_HEAD_DIMS
        and num_new <= KERNEL_TOKENS
    )


def caption_key_mask(
    valid: Bool[Array, "B T"] | Int[Array, "B T"], num_tokens: int
) -> Bool[Array, "B S"]:
    """Extend the validity of T condition tokens [B, T] to all T + num_tokens slots."""
    valid = valid.astype(bool)
    return jnp.concatenate([valid, jnp.ones((len(valid), num_tokens), bool)], axis=1)


def training_mask(caption_mask: Bool[Array, "B T"], num_tokens: int) -> Bool[Array, "B S S"]:
    """Mask of teacher forcing over the tokens of captions and S - T = `num_tokens` - 1 others."""
    key_mask = caption_key_mask(caption_mask, num_tokens - 1)
    length = key_mask.shape[1]
    return cache_mask(0, length, length, key_mask)[:, 0]


def cache_mask(
    position: Position,
    num_new: int,
    num_slots: int,
    key_mask: Bool[Array, "B S"] | None = None,
) -> Bool[Array, "N M"] | Bool[Array, "B 1 N M"]:
    """Mask of N new tokens at `position` over all slots: causal, and what `key_mask` leaves.

    A token always attends to itself, so that padded condition tokens have a softmax too.
    """
    slots = jnp.arange(num_slots)
    positions = positions_of(position, num_new)[..., None]
    mask = slots <= positions
    if key_mask is not None:
        mask = (mask & key_mask[:, None, :num_slots]) | (slots == positions)
    return mask[:, None] if mask.ndim == 3 else mask
