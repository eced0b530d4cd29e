"""Checks of arrays: what is not finite is named with its place."""

import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.common.batches import MAX_PADDED, padded_size
from dar_jax.common.checks import check_finite


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16])
def test_first_number_that_is_not_finite_is_named(dtype):
    array = np.zeros((3, 4), dtype)
    check_finite("weights", array)
    array[1, 2], array[2, 0] = np.inf, np.nan
    with pytest.raises(ValueError, match=r"^weights: 2 of 12 .* the first is inf at \(1, 2\)$"):
        check_finite("weights", array)


def test_integers_are_finite():
    check_finite("labels", np.arange(3))
    with pytest.raises(ValueError, match=r"scale: 1 of 1 numbers are not finite"):
        check_finite("scale", np.float32("nan"))


@pytest.mark.parametrize("shards", [1, 3, 4])
def test_small_batches_have_few_sizes(shards):
    sizes = range(shards, MAX_PADDED + 1, shards)
    padded = [padded_size(size, shards) for size in sizes]
    assert all(size <= new < 2 * size for size, new in zip(sizes, padded, strict=True))
    assert all(new % shards == 0 for new in padded)
    assert len(set(padded)) <= 6
    assert padded_size(MAX_PADDED + 1, 1) == MAX_PADDED + 1  # as it is
    assert padded_size(5, 4) == 5  # refused elsewhere
