"""Pre-norm transformer blocks: D-AR's with layer scale, and the plain one of TransDiff."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from dar_jax.common.typing import Any, Array, Bool, Float, Int, PRNGKeyArray
from dar_jax.nn.attention import Attention, KVCache, Mask
from dar_jax.nn.compute import Compute
from dar_jax.nn.layers import FUSED_QKV_INIT, XAVIER_INIT, Mlp, affine_layer_norm, split_rng
from dar_jax.nn.rope import Rope

MLP_RATIO = 4


def exact_gelu(x: Array) -> Array:
    """GELU by the error function, computed in float32 and rounded once."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


class TransformerBlock(nnx.Module):
    """`x += gate1 * attention(norm1(x)); x += gate2 * mlp(norm2(x))`.

    QK-norm is always on; the gates (layer scale) start at zero.
    """

    def __init__(self, dim: int, num_heads: int, *, compute: Compute, rngs: nnx.Rngs):
        self.norm1 = affine_layer_norm(dim, rngs=rngs)
        self.attention = Attention(dim, num_heads, qk_norm=True, compute=compute, rngs=rngs)
        self.norm2 = affine_layer_norm(dim, rngs=rngs)
        self.mlp = Mlp(dim, MLP_RATIO * dim, compute=compute, rngs=rngs)
        self.gate1 = nnx.Param(nnx.initializers.zeros(rngs.params(), (dim,)))
        self.gate2 = nnx.Param(nnx.initializers.zeros(rngs.params(), (dim,)))

    def __call__(
        self,
        x: Float[Array, "B N D"],
        *,
        rope: Rope | None = None,
        mask: Mask | None = None,
    ) -> Float[Array, "B N D"]:
        attended = self.attention(self.norm1(x), query_rope=rope, key_rope=rope, mask=mask)
        return self._add(x, attended)

    def extend(
        self,
        x: Float[Array, "B N D"],
        cache: KVCache,
        position: Int[Array, ""] | int,
        mask: Bool[Array, "N M"],
    ) -> tuple[Float[Array, "B N D"], KVCache]:
        """Run on N new tokens at `position` of a cache of M slots."""
        normed = self.norm1(x)
        new = self.attention.keys_values(normed)
        cache = jax.tree.map(
            lambda old, rows: jax.lax.dynamic_update_slice_in_dim(old, rows, position, axis=2),
            cache,
            new,
        )
        attended = self.attention.attend(self.attention.queries(normed), cache, mask)
        return self._add(x, attended), cache

    def _add(self, x: Float[Array, "B N D"], attended: Array) -> Float[Array, "B N D"]:
        x = x + (self.gate1[...] * attended).astype(x.dtype)
        return x + (self.gate2[...] * self.mlp(self.norm2(x))).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class BranchConfig:
    """Branches of the plain block and of those that modulate it.

    Attributes:
        dim: width.
        num_heads: of every attention.
        mlp_dim: width inside the MLP.
        attention_dropout: on attention weights.
        dropout: on the outputs of attention, of the activation and of the MLP.
    """

    dim: int
    num_heads: int
    mlp_dim: int
    attention_dropout: float = 0.0
    dropout: float = 0.0

    def attention(self, *, qkv_init: Any = FUSED_QKV_INIT, **options: Any) -> Attention:
        """Attention with biases and dropout, drawn as by Xavier."""
        return Attention(
            self.dim,
            self.num_heads,
            kernel_init=XAVIER_INIT,
            qkv_init=qkv_init,
            weight_dropout=self.attention_dropout,
            out_dropout=self.dropout,
            **options,
        )

    def mlp(self, **options: Any) -> Mlp:
        """MLP with exact GELU and dropout, drawn as by Xavier."""
        return Mlp(
            self.dim,
            self.mlp_dim,
            activation=exact_gelu,
            kernel_init=XAVIER_INIT,
            dropout_rate=self.dropout,
            **options,
        )


class PlainBlock(nnx.Module):
    """`x += attention(norm1(x)); x += mlp(norm2(x))`, both branches with dropout."""

    def __init__(self, config: BranchConfig, *, compute: Compute, rngs: nnx.Rngs):
        options = dict(compute=compute, rngs=rngs)
        self.norm1 = affine_layer_norm(config.dim, rngs=rngs)
        self.attention = config.attention(**options)
        self.norm2 = affine_layer_norm(config.dim, rngs=rngs)
        self.mlp = config.mlp(**options)

    def __call__(
        self,
        x: Float[Array, "B N D"],
        mask: Mask | None = None,
        *,
        rng: PRNGKeyArray | None = None,
    ) -> Float[Array, "B N D"]:
        """Apply the block; a key turns dropout on."""
        rng_attention, rng_mlp = split_rng(rng, 2)
        x = x + self.attention(self.norm1(x), mask=mask, rng=rng_attention)
        return x + self.mlp(self.norm2(x), rng=rng_mlp)
