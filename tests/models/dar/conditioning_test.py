"""Condition tokens made group by group."""

import jax
import numpy as np
import pytest

from dar_jax.models.dar import conditioning
from dar_jax.sampling import autoregressive
from tests.golden import models

ROUNDING = 1e-5  # the same sums in programs that XLA compiles differently; of normalised tokens


@pytest.mark.parametrize("folder", ["dar/tokenizer_tiny", "dar/tokenizer_multihead"])
def test_groups_make_the_condition_of_the_whole_sequence(folder):
    model, params = models.tokenizer(folder)
    config, rngs = model.config, jax.random.split(jax.random.key(1), 4)
    shape = (4, config.num_tokens)
    indices = jax.random.randint(jax.random.key(0), shape, 0, config.codebook_size)
    whole = jax.jit(lambda params: model.bind(params).condition_from_indices(indices))(params)
    known, parents = conditioning.start(model, rngs), np.array([[1, 0], [1, 1]])
    half = config.num_tokens // 2
    known = conditioning.extend(model, params, indices[:, :half], known, 0)
    np.testing.assert_allclose(known.tokens[:, :half], whole[:, :half], atol=ROUNDING)
    assert not np.any(known.tokens[:, half:])
    # Rows may be chosen in between, as search does.
    known, chosen = autoregressive.take((known, indices), parents)
    known = conditioning.extend(model, params, chosen[:, half:], known, half)
    np.testing.assert_allclose(known.tokens, whole[np.array([1, 0, 3, 3])], atol=ROUNDING)
