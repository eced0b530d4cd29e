"""Llama blocks as decoding runs them: unstacked, with fewer and larger matrices.

Queries, keys and values are one product, and so are both halves of SwiGLU: a token reads the same
weights in four products a layer instead of seven.
"""

import functools
import math

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from dar_jax.common.typing import Any, Array, Bool, Float, Int, Params, Shaped
from dar_jax.nn.attention import KVCache, dot_product_attention
from dar_jax.nn.compute import Compute
from dar_jax.nn.int8 import Int8, matmul, quantize, quantize_matrices
from dar_jax.nn.layers import linear, rms_norm, silu
from dar_jax.nn.linear import Linear
from dar_jax.nn.rope import Rope, apply_rope
from dar_jax.nn.stack import unstack
from dar_jax.nn.target import traced_devices

Position = Int[Array, ""] | Int[Array, " B"] | int
"""Of a token in the sequence: the same in all rows, or each row's own."""
LANES = 128
"""Numbers in a row of a TPU's memory."""
READ_PER_TOKEN = ("stack", "norm", "output")
"""Parameters that every token reads whole: all but what embeds."""
FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


class DecodingBlock(nnx.Module):
    """`llama.LlamaBlock` with fused matrices, on top of a cache.

    Attributes:
        config: `LlamaConfig`.
    """

    def __init__(self, config: Any, *, compute: Compute, rngs: nnx.Rngs):
        norm: dict[str, Any] = dict(epsilon=config.norm_epsilon, rngs=rngs)
        matrix = functools.partial(linear, use_bias=False, compute=compute, rngs=rngs)
        dim, ffn_dim = config.dim, config.ffn_dim
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads or config.num_heads
        slots = self.num_heads + 2 * self.num_kv_heads
        self.attention_norm = rms_norm(dim, **norm)
        self.attention = nnx.Dict(qkv=matrix(dim, slots * config.head_dim), out=matrix(dim, dim))
        self.ffn_norm = rms_norm(dim, **norm)
        self.ffn = nnx.Dict(gate_up=matrix(dim, 2 * ffn_dim), down=matrix(ffn_dim, dim))

    def extend(
        self,
        x: Float[Array, "B N D"],
        cache: KVCache,
        position: Position,
        rope: Rope,
        mask: Bool[Array, "..."] | None,
    ) -> tuple[Float[Array, "B N D"], KVCache]:
        """Run on N new tokens at `position` of a cache of M slots.

        By XLA with a mask [N, M] or [B, 1, N, M] and the `rope` of the new tokens. Without a mask,
        by `nn.decode_kernels` with that of all positions.
        """
        multiply: Any = product
        if mask is None:
            # Takes a second to import, which only users of these kernels need to spend.
            from dar_jax.nn import decode_kernels

            if x.shape[0] * x.shape[1] <= decode_kernels.ROWS:
                multiply = decode_kernels.product
        matrix = functools.partial(_matrix, position=position)
        qkv = multiply(x, matrix(self.attention.qkv), norm=_norm(self.attention_norm))
        if mask is None:
            attended, cache = decode_kernels.extend_and_attend(qkv, cache, position, rope)
        else:
            attended, cache = self._attend(qkv, cache, position, rope, mask)
        x = multiply(attended, matrix(self.attention.out), residual=x)
        hidden = multiply(x, matrix(self.ffn.gate_up), norm=_norm(self.ffn_norm), gated=True)
        return multiply(hidden, matrix(self.ffn.down), residual=x), cache

    def _attend(
        self,
        qkv: Float[Array, "B N width"],
        cache: KVCache,
        position: Position,
        rope: Rope,
        mask: Bool[Array, "..."],
    ) -> tuple[Float[Array, "B N D"], KVCache]:
        num_rotated = self.num_heads + self.num_kv_heads
        heads = einops.rearrange(qkv, "b n (h d) -> b n h d", h=num_rotated + self.num_kv_heads)
        rotated = apply_rope(heads[:, :, :num_rotated], rope)
        q, keys, values = (
            einops.rearrange(part, "b n h d -> b h n d")
            for part in (
                rotated[:, :, : self.num_heads],
                rotated[:, :, self.num_heads :],
                heads[:, :, num_rotated:],
            )
        )
        together, scale = cache.keys.shape[-1] // q.shape[-1], q.shape[-1] ** -0.5
        new = KVCache(join_heads(keys, together), join_heads(values, together))
        if isinstance(cache.keys, Int8):
            new = KVCache(quantize(new.keys, axis=-1), quantize(new.values, axis=-1))
        cache = jax.tree.map(lambda old, rows: write_slots(old, rows, position), cache, new)
        keys, values = (
            part.whole() if isinstance(part, Int8) else part for part in (cache.keys, cache.values)
        )
        q = spread_heads(q, self.num_kv_heads, together)
        attended = dot_product_attention(q, keys, values, mask, scale=scale)
        attended = gather_heads(attended, self.num_kv_heads, together)
        return einops.rearrange(attended, "b h n d -> b n (h d)"), cache


def _matrix(layer: Linear, position: Position) -> Float[Array, "width F"] | Int8:
    """Return the matrix in the compute dtype; as int8 it is read in every turn of a loop anew."""
    kernel = layer.kernel.get_value().astype(layer.dtype)
    return kernel.read_after(position) if isinstance(kernel, Int8) else kernel


def _norm(layer: nnx.RMSNorm) -> tuple[Float[Array, " width"], float]:
    return jnp.asarray(layer.scale), layer.epsilon  # every norm of a Llama has a scale


def product(
    x: Float[Array, "B N width"],
    matrix: Float[Array, "width F"] | Int8,
    *,
    norm: tuple[Float[Array, " width"], float] | None = None,
    gated: bool = False,
    residual: Float[Array, "B N F"] | None = None,
) -> Array:
    """Multiply rows by a matrix, by XLA.

    A row is divided by its root mean square after the product, which then waits for no sum.

    Args:
        x: the rows.
        matrix: in the compute dtype, or int8.
        norm: scale and epsilon of the RMS norm before.
        gated: the result is silu(first half) * second half, [B, N, F / 2].
        residual: what the result is added to.
    """
    dtype, inverse = matrix.dtype, None
    if norm is not None:
        scale, epsilon = norm
        x = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)
        x *= scale
    wide = dtype if inverse is None else jnp.float32
    result = matmul(x.astype(dtype), matrix, wide)
    if inverse is not None:
        result = (result * inverse).astype(dtype)
    if gated:
        gate, up = jnp.split(result, 2, axis=-1)
        result = silu(gate) * up
    return result if residual is None else residual + result


def heads_together(head_dim: int, num_kv_heads: int) -> int:
    """How many key/value heads share a row of a cache.

    A TPU keeps rows of 128 numbers: heads of 64 in rows of their own are half padding, to be read
    with the rest, and XLA copies such caches in every turn of the loop besides. (v5e, D-AR-L, 64
    images: temporaries of 3.4 GB, and 5.3 GB moved for a token instead of 3.5.)
    """
    if traced_devices()[0].platform != "tpu":
        return 1
    return math.gcd(max(LANES // head_dim, 1), num_kv_heads)


def join_heads(x: Float[Array, "B kv_heads N d"], together: int) -> Float[Array, "B rows N wide"]:
    """Put neighbouring heads side by side in rows."""
    return einops.rearrange(x, "b (h t) n d -> b h n (t d)", t=together)


def spread_heads(
    q: Float[Array, "B heads N d"], num_kv_heads: int, together: int
) -> Float[Array, "B heads N wide"]:
    """Put every query where its head is in a row, beside zeros: the products stay the same."""
    if together == 1:
        return q
    q = einops.rearrange(q, "b (h t g) n d -> b h t g n d", t=together, h=num_kv_heads // together)
    q = jnp.einsum("bhtgnd,ts->bhtgnsd", q, jnp.eye(together, dtype=q.dtype))
    return einops.rearrange(q, "b h t g n s d -> b (h t g) n (s d)")


def gather_heads(
    x: Float[Array, "B heads N wide"], num_kv_heads: int, together: int
) -> Float[Array, "B heads N d"]:
    """Take of what every head's weights give the part that is its own."""
    if together == 1:
        return x
    parts = dict(t=together, h=num_kv_heads // together)
    x = einops.rearrange(x, "b (h t g) n (s d) -> b h t g n s d", s=together, **parts)
    x = jnp.stack([x[:, :, head, ..., head, :] for head in range(together)], axis=2)
    return einops.rearrange(x, "b h t g n d -> b (h t g) n d")


def positions_of(position: Position, num_new: int) -> Int[Array, " N"] | Int[Array, "B N"]:
    """Return the positions of N new tokens, of which `position` is the first one's."""
    return jnp.expand_dims(position, -1) + jnp.arange(num_new)


def write_slots(
    cache: Shaped[Array, "B kv_heads M width"],
    new: Shaped[Array, "B kv_heads N width"],
    position: Position,
) -> Shaped[Array, "B kv_heads M width"]:
    """Write the slots from `position` on."""
    new = new.astype(cache.dtype)
    if jnp.ndim(position) == 0:
        return jax.lax.dynamic_update_slice_in_dim(cache, new, position, axis=2)
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
    return jax.vmap(write)(cache, new, position)


def decoding_params(params: Params, weights: str = "compute") -> Params:
    """Unstack the parameters of a Llama and fuse its matrices, for `Compute(stacked=False)`.

    Args:
        params: of the stacked model.
        weights: see `Compute.decode_weights`; int8 puts what every token reads whole in it.
    """

    def fuse(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        tree = {name: fuse(value) for name, value in tree.items()}
        for fused, names in FUSED.items():
            if set(names) <= set(tree):
                parts = [tree.pop(name)["kernel"] for name in names]
                tree[fused] = {"kernel": jnp.concatenate(parts, axis=-1)}
        return tree

    params = fuse(unstack(params))
    if weights == "int8":
        params |= quantize_matrices({name: params[name] for name in READ_PER_TOKEN})
    return params
