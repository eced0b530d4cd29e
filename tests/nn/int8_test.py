"""Arrays in int8: how far they are from what they stand for, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.nn.compute import Compute
from dar_jax.nn.int8 import Int8, check_finite, matmul, quantize, quantize_matrices
from dar_jax.nn.target import traced_for

DEPTH, COLUMNS = 48, 96
SUMS = 1e-5  # in another order


def matrix(scale=1.0):
    spread = jnp.geomspace(1e-3, 10, COLUMNS)  # columns of all sizes
    return scale * spread * jax.random.normal(jax.random.key(0), (DEPTH, COLUMNS))


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_error_is_at_most_half_a_step(axis, scale):
    x = matrix(scale)
    small = quantize(x, axis=axis)
    assert small.values.dtype == jnp.int8 and small.shape == x.shape
    assert small.scales.shape == ((1, COLUMNS) if axis == 0 else (DEPTH, 1))
    np.testing.assert_array_equal(jnp.abs(small.values).max(axis), 127)
    rounding = 1e-6 * jnp.abs(x)  # of the quotient, in float32
    assert np.all(np.abs(small.whole() - x) <= small.scales / 2 + rounding)


def test_zeros_stay_zeros():
    x = matrix().at[:, 3].set(0).at[:, 4].set(1e-42)
    whole = quantize(x, axis=0).whole()
    np.testing.assert_array_equal(whole[:, 3:5], 0)
    assert np.all(np.isfinite(whole)) and np.all(np.any(whole[:, 5:] != 0, axis=0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_product_is_that_of_the_whole_matrix(dtype, platform, monkeypatch):
    monkeypatch.setattr("dar_jax.nn.int8.COLUMNS", 32)  # turns of three
    small = quantize(matrix(), axis=0)
    x = jax.random.normal(jax.random.key(1), (2, 3, DEPTH)).astype(dtype)
    device = type("Device", (), {"platform": platform})()
    with traced_for([device]):
        product = matmul(x, small.astype(dtype), jnp.float32)
    expected = jnp.einsum("bni,io->bno", x.astype(jnp.float32), small.whole())
    assert product.dtype == jnp.float32
    atol = SUMS * float(jnp.abs(expected).max())
    np.testing.assert_allclose(product, expected, rtol=SUMS, atol=atol)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused_with_their_place(wrong):
    params = {"layer": {"kernel": matrix(), "bias": jnp.full(COLUMNS, jnp.nan)}}
    assert isinstance(check_finite(quantize_matrices(params))["layer"]["kernel"], Int8)
    params["layer"]["kernel"] = matrix().at[1, 2].set(wrong)
    with pytest.raises(ValueError, match=r"^layer/kernel holds numbers that are not finite.*int8"):
        check_finite(quantize_matrices(params))


@pytest.mark.parametrize("name", ["decode_weights", "decode_cache"])
def test_what_cannot_be_combined_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} 'int4' must be one of compute, int8"):
        Compute(**{name: "int4"})
    with pytest.raises(ValueError, match=f"{name}='int8' needs decoding='xla'"):
        Compute(**{name: "int8"}, decoding="pallas")
