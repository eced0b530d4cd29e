"""Multi-head attention: optional QK-norm, rotary embedding, grouped queries, dropout, KV cache."""

from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from dar_jax.common.typing import Array, Bool, Float, PRNGKeyArray
from dar_jax.nn.compute import Compute
from dar_jax.nn.fused_attention import Causal, choose, fused_attention
from dar_jax.nn.layers import affine_layer_norm, block_init, dropout, linear, split_rng
from dar_jax.nn.linear import Linear
from dar_jax.nn.rope import Rope, apply_rope


class KVCache(NamedTuple):
    """Keys and values of one layer, [B, kv_heads, M, head_dim]: heads lead, so that the batched
    products of decoding need no transposed copy of the cache. On TPUs neighbouring heads of a
    prior share rows, see `models.dar.decoding`."""

    keys: Array
    values: Array


Mask = Bool[Array, "..."] | Causal
"""Who may attend: an array, True may, or a rule, which kernels need not read."""


def dot_product_attention(
    q: Float[Array, "B heads N head_dim"],
    k: Float[Array, "B kv_heads M head_dim"],
    v: Float[Array, "B kv_heads M head_dim"],
    mask: Mask | None = None,
    *,
    dropout_rate: float = 0.0,
    rng: PRNGKeyArray | None = None,
    attention: str = "auto",
    scale: float | None = None,
) -> Float[Array, "B heads N head_dim"]:
    """Softmax attention; the softmax is float32.

    Query head h uses key/value head h // (heads / kv_heads).

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: who may attend; an array broadcasts to [B, 1, N, M].
        dropout_rate: of the attention weights.
        rng: turns dropout on.
        attention: see `Compute`.
        scale: of the products; None is 1/sqrt(head_dim), as that of kernels always is.
    """
    drops_weights = rng is not None and dropout_rate > 0
    kernel = choose(attention, q, k, mask, drops_weights=drops_weights)
    if kernel != "xla":
        assert scale is None and (mask is None or isinstance(mask, Causal))
        return fused_attention(kernel, q, k, v, mask)
    if isinstance(mask, Causal):
        mask = mask.array(q.shape[2], k.shape[2])
    grouped = einops.rearrange(q, "b (kv group) n d -> b kv group n d", kv=k.shape[1])
    scores = jnp.einsum("bkgnd,bkmd->bkgnm", grouped, k, preferred_element_type=jnp.float32)
    scores *= q.shape[-1] ** -0.5 if scale is None else scale
    if mask is not None:
        mask = jnp.broadcast_to(mask, (mask.shape[0] if mask.ndim == 4 else 1, 1, *mask.shape[-2:]))
        scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    weights = dropout(weights, dropout_rate, rng)
    out = jnp.einsum("bkgnm,bkmd->bkgnd", weights, v)
    return einops.rearrange(out, "b kv group n d -> b (kv group) n d")


class Attention(nnx.Module):
    """Attention of x over itself or over a context."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        qk_norm: bool = False,
        use_bias: bool = True,
        kernel_init=block_init,
        qkv_init=None,
        weight_dropout: float = 0.0,
        out_dropout: float = 0.0,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        if dim % num_heads:
            raise ValueError(f"width {dim} must be a multiple of num_heads {num_heads}")
        if num_heads % (num_kv_heads or num_heads):
            raise ValueError(
                f"num_heads {num_heads} must be a multiple of num_kv_heads {num_kv_heads}"
            )
        head_dim = dim // num_heads
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.weight_dropout = weight_dropout
        self.out_dropout = out_dropout
        self.attention = compute.attention

        def projection(heads_in: int, heads_out: int, init=qkv_init or kernel_init) -> Linear:
            return linear(
                heads_in * head_dim,
                heads_out * head_dim,
                use_bias=use_bias,
                kernel_init=init,
                compute=compute,
                rngs=rngs,
            )

        self.q = projection(num_heads, self.num_heads)
        self.k = projection(num_heads, self.num_kv_heads)
        self.v = projection(num_heads, self.num_kv_heads)
        self.out = projection(num_heads, num_heads, kernel_init)
        self.q_norm = affine_layer_norm(head_dim, rngs=rngs) if qk_norm else None
        self.k_norm = affine_layer_norm(head_dim, rngs=rngs) if qk_norm else None

    def __call__(
        self,
        x: Float[Array, "B N D"],
        context: Float[Array, "B M D"] | None = None,
        *,
        query_rope: Rope | None = None,
        key_rope: Rope | None = None,
        mask: Mask | None = None,
        rng: PRNGKeyArray | None = None,
    ) -> Float[Array, "B N D"]:
        """Attend from x to `context` (default: x itself).

        Args:
            x: where queries come from.
            context: where keys and values come from.
            query_rope: rotation of the queries, after the norm.
            key_rope: rotation of the keys, after the norm.
            mask: who may attend; an array is [N, M] or [B, 1, N, M].
            rng: turns dropout on.
        """
        context = x if context is None else context
        q = self.queries(x, query_rope)
        cache = self.keys_values(context, key_rope)
        return self.attend(q, cache, mask, rng)

    def queries(self, x: Float[Array, "B N D"], rope: Rope | None = None) -> Array:
        """Return normalised and rotated queries [B, heads, N, head_dim]."""
        return self._heads(self.q(x), self.num_heads, self.q_norm, rope)

    def keys_values(self, context: Float[Array, "B M D"], rope: Rope | None = None) -> KVCache:
        """Return normalised and rotated keys, and values."""
        keys = self._heads(self.k(context), self.num_kv_heads, self.k_norm, rope)
        return KVCache(keys, self._heads(self.v(context), self.num_kv_heads, None, None))

    def attend(
        self,
        q: Array,
        cache: KVCache,
        mask: Mask | None = None,
        rng: PRNGKeyArray | None = None,
    ) -> Array:
        """Attend with given queries, keys and values, merge the heads, project: [B, N, D]."""
        rng_weights, rng_out = split_rng(rng, 2)
        out = dot_product_attention(
            q,
            cache.keys,
            cache.values,
            mask,
            dropout_rate=self.weight_dropout,
            rng=rng_weights,
            attention=self.attention,
        )
        out = self.out(einops.rearrange(out, "b heads n d -> b n (heads d)"))
        return dropout(out, self.out_dropout, rng_out)

    def _heads(self, x: Array, heads: int, norm, rope: Rope | None) -> Array:
        dtype = x.dtype
        x = einops.rearrange(x, "b n (heads d) -> b n heads d", heads=heads)
        if norm is not None:
            x = norm(x)
        if rope is not None:
            x = apply_rope(x, rope)
        return einops.rearrange(x, "b n heads d -> b heads n d").astype(dtype)
