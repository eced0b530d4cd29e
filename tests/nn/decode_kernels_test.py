"""The kernel of decoding, interpreted, against XLA's attention over a cache."""

import functools

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.models.dar.decoding import positions_of, product, write_slots
from dar_jax.models.dar.llama import cache_mask
from dar_jax.nn import decode_kernels
from dar_jax.nn.attention import KVCache, dot_product_attention
from dar_jax.nn.compute import Compute
from dar_jax.nn.decode_kernels import extend_and_attend
from dar_jax.nn.fused_attention import check_device
from dar_jax.nn.rope import apply_rope, rope_1d

HEADS, HEAD_DIM, SLOTS = 2, 16, 140
ROUNDING = {
    "float32": 2e-6,
    "bfloat16": 3e-2,
}  # of sums in another order, and of weights before or after division
ROPE = rope_1d(SLOTS + 10, HEAD_DIM, 10000.0)


def by_xla(qkv, cache, position):
    q, k, v = einops.rearrange(qkv, "b n (three h d) -> three b n h d", three=3, h=HEADS)
    rope = ROPE[positions_of(position, qkv.shape[1])]
    q, k, v = (
        einops.rearrange(x, "b n h d -> b h n d")
        for x in (apply_rope(q, rope), apply_rope(k, rope), v)
    )
    keys, values = write_slots(cache.keys, k, position), write_slots(cache.values, v, position)
    out = dot_product_attention(q, keys, values, cache_mask(position, qkv.shape[1], SLOTS))
    return einops.rearrange(out, "b h n d -> b n (h d)"), KVCache(keys, values)


@jax.jit
def by_kernel(qkv, cache, position):
    return extend_and_attend(qkv, cache, position, ROPE, interpret=True)


def inputs(num_new, dtype):
    rngs = jax.random.split(jax.random.key(num_new), 3)
    qkv = jax.random.normal(rngs[0], (2, num_new, 3 * HEADS * HEAD_DIM)).astype(dtype)
    shape = (2, HEADS, SLOTS, HEAD_DIM)
    return qkv, KVCache(*(jax.random.normal(rng, shape).astype(dtype) for rng in rngs[1:]))


def assert_close(found, expected):
    """Of rounding's size, relative to the largest number."""
    assert found.dtype == expected.dtype
    atol = ROUNDING[expected.dtype.name] * float(jnp.abs(expected).max())
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), atol=atol)


@pytest.mark.parametrize(
    ("num_new", "position", "dtype"),
    [(1, 64, "float32"), (5, np.array([3, 130], np.int32), "float32"), (8, 0, "bfloat16")],
)
def test_attention_equals_xla(num_new, position, dtype):
    qkv, cache = inputs(num_new, dtype)
    attended, extended = by_kernel(qkv, cache, position)
    expected, expected_cache = jax.jit(by_xla)(qkv, cache, position)
    assert_close(attended, expected)
    np.testing.assert_array_equal(extended.values, expected_cache.values)
    assert_close(extended.keys, expected_cache.keys)


def test_tokens_together_attend_as_one_after_the_other():
    qkv, cache = inputs(2, "float32")
    spoilt = jax.tree.map(lambda slots: slots.at[:, :, 63:].set(jnp.nan), cache)  # not filled yet
    together, _ = by_kernel(qkv, spoilt, 63)
    for i in range(2):  # the last slot of a block and the first of the next
        alone, spoilt = by_kernel(qkv[:, i : i + 1], spoilt, 63 + i)
        assert_close(alone, together[:, i : i + 1])


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_product_equals_xla(dtype):
    rngs = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(rngs[0], (4, 3, 256))
    matrix = (jax.random.normal(rngs[1], (256, 64)) / 16).astype(dtype)
    norm = (jax.random.uniform(rngs[2], (256,)), 1e-5)
    residual = jax.random.normal(rngs[3], (4, 3, 64))
    for options in (dict(norm=norm), dict(norm=norm, gated=True), dict(residual=residual)):
        kernel = functools.partial(decode_kernels.product, interpret=True)
        assert_close(kernel(x, matrix, **options), product(x, matrix, **options))


def test_rows_do_not_depend_on_their_number():
    rngs = jax.random.split(jax.random.key(0), 2)
    x, matrix = jax.random.normal(rngs[0], (16, 1, 256)), jax.random.normal(rngs[1], (256, 64))
    many = decode_kernels.product(x, matrix, interpret=True)
    few = decode_kernels.product(x[3:5], matrix, interpret=True)
    np.testing.assert_array_equal(few, many[3:5])


def test_another_device_is_refused():
    compute = Compute(dtype="bfloat16", decoding="pallas")
    with pytest.raises(ValueError, match=r"decoding=pallas needs one NVIDIA GPU .* cpu"):
        check_device(compute, jax.devices()[:1])
