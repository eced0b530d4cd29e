"""Order among the queries, the mask that makes it, and image sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.nn.fused_attention import Causal
from tests.golden import models

NUM_TOKENS = 16


@pytest.fixture(scope="module")
def tokenizer():
    return models.tokenizer("dar/tokenizer_tiny")


@pytest.fixture
def image():
    return jax.random.uniform(jax.random.key(0), (1, 32, 32, 3), minval=-1.0)


def test_code_depends_on_earlier_queries_only(tokenizer, image):
    model, params = tokenizer

    @jax.jit
    def sensitivity(table):
        def code_sums(table):
            changed = params | {"encoder": params["encoder"] | {"query_table": table}}
            return jnp.sum(model.bind(changed).encoder(image)[0], axis=-1)

        return jnp.linalg.norm(jax.jacrev(code_sums)(table), axis=-1)

    influence = np.asarray(sensitivity(params["encoder"]["query_table"]))
    np.testing.assert_array_equal(influence[:, :NUM_TOKENS] > 0, np.tri(NUM_TOKENS, dtype=bool))
    np.testing.assert_array_equal(influence[:, NUM_TOKENS:], 0.0)


def test_first_code_depends_on_every_pixel(tokenizer, image):
    model, params = tokenizer

    @jax.jit
    @jax.grad
    def sensitivity(image):
        return jnp.sum(model.bind(params).encoder(image)[0, 0])

    assert np.all(np.asarray(sensitivity(image)) != 0)


def test_mask_hides_queries_from_patches():
    mask = np.asarray(Causal(prefix=3).array(5, 5))
    expected = np.array([[1, 1, 1, 0, 0]] * 3 + [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], bool)
    np.testing.assert_array_equal(mask, expected)


def test_other_sizes_give_as_many_codes(tokenizer):
    model, params = tokenizer
    code = jax.eval_shape(lambda x: model.bind(params).encoder(x), jnp.zeros((2, 64, 24, 3)))
    assert code.shape == (2, NUM_TOKENS, 8)


def test_size_off_the_patch_grid_is_refused(tokenizer):
    model, params = tokenizer
    with pytest.raises(ValueError, match=r"image of 32x36 pixels.*patch size 8"):
        model.bind(params).encoder(jnp.zeros((1, 32, 36, 3)))
