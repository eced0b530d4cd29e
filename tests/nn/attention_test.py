"""Attention against a plain loop over heads, with masks, groups and rotations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dar_jax.nn.attention import Attention, dot_product_attention
from dar_jax.nn.compute import Compute
from dar_jax.nn.fused_attention import Causal
from dar_jax.nn.rope import rope_1d

ATOL = 1e-5  # float32 sums of at most 16 terms of order 1
RTOL = 1e-4  # of the largest entry, through two projections and a sharp softmax


def draw(*shape):
    return jax.random.normal(jax.random.key(hash(shape) % 1000), shape)


def loop_over_heads(q, k, v, mask):
    """Softmax attention, one head at a time, in float64."""
    q, k, v = (np.asarray(array, np.float64) for array in (q, k, v))
    out = np.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for b in range(len(q)):
        for head in range(q.shape[1]):
            scores = q[b, head] @ k[b, head // group].T / np.sqrt(q.shape[-1])
            weights = np.where(mask[b], np.exp(scores - scores.max()), 0.0)
            out[b, head] = weights / weights.sum(-1, keepdims=True) @ v[b, head // group]
    return out


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_dot_product_attention_equals_a_loop(kv_heads, masked):
    q, k, v = draw(2, 4, 5, 8), draw(2, kv_heads, 7, 8), draw(2, kv_heads, 7, 8) ** 2
    mask = np.ones((2, 5, 7), bool)
    if masked:
        mask = np.array(jax.random.bernoulli(jax.random.key(0), 0.5, mask.shape))
        mask[:, :, 0] = True
    given = jnp.asarray(mask)[:, None] if masked else None
    out = jax.jit(dot_product_attention)(q, k, v, given)
    np.testing.assert_allclose(out, loop_over_heads(q, k, v, mask), atol=ATOL)


def test_one_mask_serves_the_batch():
    q, k = draw(2, 4, 5, 8), draw(2, 4, 5, 8)
    mask = Causal().array(5, 5)
    expected = loop_over_heads(q, k, k, np.broadcast_to(mask, (2, 5, 5)))
    np.testing.assert_allclose(dot_product_attention(q, k, k, mask), expected, atol=ATOL)
    np.testing.assert_allclose(dot_product_attention(q, k, k, Causal()), expected, atol=ATOL)


def test_causal_mask_aligns_the_last_query_with_the_last_key():
    np.testing.assert_array_equal(Causal().array(2, 4), [[1, 1, 1, 0], [1, 1, 1, 1]])


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=RTOL * np.max(np.abs(expected)))


def attention(**options):
    module = Attention(16, 4, compute=Compute(), rngs=nnx.Rngs(0), **options)
    # Larger than initial weights, so that attention is not uniform.
    return jax.tree.map(lambda leaf: 20 * leaf, module)


def test_self_attention_is_attention_over_itself():
    module, x = attention(qk_norm=True), draw(2, 5, 16)
    np.testing.assert_array_equal(module(x), module(x, x))


def test_rotated_attention_sees_relative_positions_only():
    module, x, rope = attention(), draw(1, 4, 16), rope_1d(9, 4, 100.0)
    here = module(x, query_rope=rope[:4], key_rope=rope[:4])
    there = module(x, query_rope=rope[5:], key_rope=rope[5:])
    assert_close(here, there)
    with pytest.raises(AssertionError):
        assert_close(here, module(x))


def test_qk_norm_makes_the_scale_of_queries_irrelevant():
    module, x = attention(qk_norm=True), draw(1, 4, 16)
    expected = module(x)
    module.q.kernel[...] *= 1000.0
    assert_close(module(x), expected)


def test_grouped_projections_are_narrower():
    module = attention(num_kv_heads=2, use_bias=False)
    assert module.k.kernel.shape == module.v.kernel.shape == (16, 8)
    assert module.keys_values(draw(2, 5, 16), None).keys.shape == (2, 2, 5, 4)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "message"),
    [
        (3, None, "width 16 must be a multiple of num_heads 3"),
        (4, 3, "num_heads 4 must be a multiple of num_kv_heads 3"),
    ],
)
def test_heads_that_do_not_divide_are_refused(heads, kv_heads, message):
    with pytest.raises(ValueError, match=message):
        Attention(16, heads, num_kv_heads=kv_heads, compute=Compute(), rngs=nnx.Rngs(0))
