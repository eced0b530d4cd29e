"""Kernels of decoding for NVIDIA GPUs (Pallas, Triton): a few new tokens over a cache.

`extend_and_attend` is what XLA makes four kernels of, which read all slots of a cache: it rotates
queries and keys, writes keys and values to their slots and attends to the slots that are filled,
block by block with a running softmax (Milakov & Gimelshein 2018, arXiv:1805.02867). `product` is a
product of at most 16 rows with what stands around it: the norm before, SwiGLU or the residual
after. With both, a Llama block takes five kernels instead of twelve.

A row's sums do not depend on how many others it comes with.

Deviation: attention weights are rounded before they are divided by their sum, not after.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dar_jax.common.typing import Any, Array, Float, Int
from dar_jax.nn.attention import KVCache
from dar_jax.nn.layers import silu
from dar_jax.nn.rope import Rope

ROWS = 16
"""Of the tiles that tensor cores multiply; there may be fewer new tokens."""
SLOTS = 64
"""Slots of a block of a cache."""
DEPTH, COLUMNS = 128, 16
"""Rows and columns of a block of a matrix."""


def extend_and_attend(
    qkv: Float[Array, "R N width"],
    cache: KVCache,
    position: Int[Array, ""] | Int[Array, " R"] | int,
    rope: Rope,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "R N D"], KVCache]:
    """Write N new tokens' keys and values into a cache and attend, each to all up to itself.

    Args:
        qkv: queries, keys and values of equally many heads, not rotated, N <= `ROWS`; width is
            3 heads * head_dim.
        cache: [R, heads, M, head_dim], of which the slots before `position` are filled.
        position: of the first new token, one for all rows or one of each.
        rope: table of all positions.
        interpret: run on any device, slowly.
    """
    (rows, num_new, _), (_, heads, _, head_dim) = qkv.shape, cache.keys.shape
    qkv = qkv.reshape(rows, num_new, 3, heads, head_dim)
    cos = jnp.repeat(rope.cos, 2, axis=-1)
    sin = jnp.stack([-rope.sin, rope.sin], axis=-1).reshape(cos.shape)
    positions = jnp.broadcast_to(jnp.asarray(position, jnp.int32), (rows,))
    of_head = pl.BlockSpec((None, None, *cache.keys.shape[2:]), lambda row, head: (row, head, 0, 0))
    tokens = (None, num_new, 3, None, head_dim)
    table = pl.BlockSpec(cos.shape, lambda row, head: (0, 0))
    attended, keys, values = pl.pallas_call(
        functools.partial(_kernel, num_new=num_new),
        grid=(rows, heads),
        in_specs=[
            pl.BlockSpec((None,), lambda row, head: (row,)),
            pl.BlockSpec(tokens, lambda row, head: (row, 0, 0, head, 0)),
            table,
            table,
            of_head,
            of_head,
        ],
        out_specs=[
            pl.BlockSpec((None, num_new, None, head_dim), lambda row, head: (row, 0, head, 0)),
            of_head,
            of_head,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((rows, num_new, heads, head_dim), qkv.dtype),
            *cache,
        ],
        input_output_aliases={4: 1, 5: 2},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="extend_and_attend",
    )(positions, qkv, cos, sin, *cache)
    return attended.reshape(rows, num_new, heads * head_dim), KVCache(keys, values)


def _kernel(position, qkv, cos, sin, _keys, _values, out, keys, values, *, num_new):
    """One head of one row. Slots from `position` on are only written, those before only read."""
    head_dim, dtype = keys.shape[-1], keys.dtype
    first = position[()]
    rows, columns = jnp.arange(ROWS)[:, None], jnp.arange(head_dim)[None]
    real = rows < num_new
    angles = (jnp.where(real, first + rows, 0), columns)
    cosines, sines = (triton.load(table.at[angles]) for table in (cos, sin))

    def new(part: int, columns: Array) -> Array:
        whole = (rows, part, columns)
        return triton.load(qkv.at[whole], mask=real, other=0.0).astype(jnp.float32)

    def rotated(part: int) -> Array:
        # The other of a pair of channels (2i, 2i + 1) is columns ^ 1.
        turned = new(part, columns) * cosines + new(part, columns ^ 1) * sines
        return turned.astype(dtype)

    q, new_keys, new_values = rotated(0), rotated(1), new(2, columns).astype(dtype)
    slots = (first + rows, columns)
    triton.store(keys.at[slots], new_keys, mask=real)
    triton.store(values.at[slots], new_values, mask=real)

    def attend(carry, k: Array, v: Array, seen: Array):
        summed, top, total = carry
        scores = triton.dot(q, k.T) * head_dim**-0.5
        scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
        higher = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
        shrunk, weights = jnp.exp(top - higher), jnp.exp(scores - higher)
        summed = summed * shrunk + triton.dot(weights.astype(dtype), v)
        return summed, higher, total * shrunk + jnp.sum(weights, axis=1, keepdims=True)

    def block(index: Array, carry):
        slots = index * SLOTS + jnp.arange(SLOTS)
        filled = (slots < first)[:, None]
        k, v = (
            triton.load(cached.at[slots[:, None], columns], mask=filled, other=0.0)
            for cached in (keys, values)
        )
        return attend(carry, k, v, (slots < first)[None])

    carry = (
        jnp.zeros((ROWS, head_dim), jnp.float32),
        jnp.full((ROWS, 1), jnp.finfo(jnp.float32).min),
        jnp.zeros((ROWS, 1), jnp.float32),
    )
    carry = jax.lax.fori_loop(0, pl.cdiv(first, SLOTS), block, carry)
    others = jnp.arange(ROWS)[None]
    summed, _, total = attend(carry, new_keys, new_values, (others <= rows) & (others < num_new))
    triton.store(out.at[rows, columns], (summed / total).astype(out.dtype), mask=real)


def product(
    x: Float[Array, "R N width"],
    matrix: Float[Array, "width F"],
    *,
    norm: tuple[Float[Array, " width"], float] | None = None,
    gated: bool = False,
    residual: Float[Array, "R N F"] | None = None,
    interpret: bool = False,
) -> Array:
    """Multiply R * N <= `ROWS` rows by a matrix whose sides are multiples of its blocks'.

    Args:
        x: the rows.
        matrix: in the compute dtype.
        norm: scale and epsilon of the RMS norm before.
        gated: the result is silu(first half) * second half, [R, N, F / 2].
        residual: what the result is added to; otherwise it has the matrix's dtype.
        interpret: run on any device, slowly.
    """
    num_rows, parts = x.shape[0] * x.shape[1], 2 if gated else 1
    width, columns = matrix.shape[0], matrix.shape[1] // parts
    dtype = matrix.dtype if residual is None else residual.dtype
    inputs: dict[str, Any] = {"x": x.reshape(num_rows, width), "matrix": matrix}
    if norm is not None:
        inputs["scale"] = norm[0]
    if residual is not None:
        inputs["residual"] = residual.reshape(num_rows, columns)

    def kernel(*refs: Any) -> None:
        _product(dict(zip(inputs, refs, strict=False)), refs[-1], parts, norm and norm[1])

    out = pl.pallas_call(
        kernel,
        grid=(columns // COLUMNS,),
        in_specs=[
            pl.BlockSpec(each.shape, lambda _, n=each.ndim: (0,) * n) for each in inputs.values()
        ],
        out_specs=pl.BlockSpec((num_rows, columns), lambda _: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((num_rows, columns), dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name="product",
    )(*inputs.values())
    return out.reshape(*x.shape[:2], columns)


def _product(refs: dict[str, Any], out: Any, parts: int, epsilon: float | None) -> None:
    """`COLUMNS` columns of the result, of either part."""
    x, matrix = refs["x"], refs["matrix"]
    (num_rows, width), dtype = x.shape, matrix.dtype
    rows = jnp.arange(ROWS)[:, None]
    real = rows < num_rows
    columns = pl.program_id(0) * COLUMNS + jnp.arange(COLUMNS)[None]

    def block(index: Array, carry: Any) -> Any:
        sums, squares = carry
        depth = index * DEPTH + jnp.arange(DEPTH)
        left = triton.load(x.at[rows, depth[None]], mask=real, other=0.0).astype(jnp.float32)
        if epsilon is not None:
            squares += jnp.sum(left * left, axis=1, keepdims=True)
            left *= triton.load(refs["scale"].at[depth])[None]
        left = left.astype(dtype)
        rights = (
            triton.load(matrix.at[depth[:, None], part * out.shape[1] + columns])
            for part in range(parts)
        )
        sums = tuple(s + triton.dot(left, right) for s, right in zip(sums, rights, strict=True))
        return sums, squares

    zeros = jnp.zeros((ROWS, COLUMNS), jnp.float32)
    carry = ((zeros,) * parts, jnp.zeros((ROWS, 1), jnp.float32))
    sums, squares = jax.lax.fori_loop(0, width // DEPTH, block, carry)
    if epsilon is not None:
        inverse = jax.lax.rsqrt(squares / width + epsilon)
        sums = tuple(s * inverse for s in sums)
    result, *others = (s.astype(dtype) for s in sums)
    for up in others:
        result = silu(result) * up
    if "residual" in refs:
        result += triton.load(refs["residual"].at[rows, columns], mask=real, other=0.0)
    triton.store(out.at[rows, columns], result.astype(out.dtype), mask=real)
