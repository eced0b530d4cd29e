"""TransDiff's sizes, masks, prefixes, cached keys and values; and what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.common.tree import num_parameters
from dar_jax.convert import transdiff as convert
from dar_jax.convert.rules import reference_shapes
from dar_jax.models.transdiff.model import (
    AT_512_PIXELS,
    MRAR,
    SIZES,
    TransDiff,
    TransDiffConfig,
)
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.nn.stack import unstack
from tests.random_params import random_params
from tests.tiny_transdiff import MRAR as TINY

# Number of parameters and of tensors, from the instantiated modules of the reference.
ONE_STEP = {"b": 289_959_184, "l": 682_519_568, "h": 1_327_891_216}
WITH_REFERENCES = {"b": 290_044_432, "l": 682_633_232, "h": 1_328_033_296}
LARGE = {"b": 290_549_008, "l": 683_306_000, "h": 1_328_874_256}
TENSORS = {"b": 589, "l": 777, "h": 965}
ROUNDING = 1e-4  # the same sums in other orders; outputs reach 50


@pytest.mark.parametrize("size", SIZES)
def test_released_sizes(size):
    for options, counts in (({}, ONE_STEP), (MRAR, WITH_REFERENCES), (AT_512_PIXELS, LARGE)):
        config = TransDiffConfig(**SIZES[size], **options)
        params = FunctionalModel(TransDiff, config).abstract_params()
        assert num_parameters(params) == counts[size]
        names = reference_shapes(convert.transdiff_rules(config), params)
        assert len(names) == TENSORS[size]


def model_and_params(config):
    model = FunctionalModel(TransDiff, config)
    return model, jax.device_put(random_params(model.abstract_params()))


@functools.partial(jax.jit, static_argnames="model")
def condition_of(model, params, labels, references=None):
    return model.bind(params).condition(labels, references)


@functools.partial(jax.jit, static_argnames=("model", "copies"))
def velocity_of(model, params, x, t, condition, copies=None):
    module = model.bind(params)
    mask = None if copies is None else module.prefix_mask(copies)
    return module.decoder.velocity(x, t, module.decoder.keys_values(condition), mask)


def test_cached_keys_and_values_equal_recomputed_ones():
    model, params = model_and_params(TINY)
    rngs = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(rngs[0], (2, 4, 4, 2))
    t = jnp.array([0.2, 0.7])
    condition = condition_of(model, params, jnp.array([0, 3]))
    velocity = velocity_of(model, params, x, t, condition)

    decoder = model.bind(params).decoder
    tokens, (time, modulation) = decoder.embed(x), decoder.embed_time(1 - t)
    context = decoder.condition_projection(condition)
    apart = FunctionalModel(TransDiff, TINY).unstacked()
    for block in apart.bind(unstack(params)).decoder.stack.blocks:
        cache = block.cross_attention.keys_values(context)
        tokens = block(tokens, cache, modulation)
    expected = -decoder.final_layer(tokens, time).reshape(x.shape)
    np.testing.assert_allclose(velocity, expected, atol=ROUNDING)


def test_condition_of_fewer_references_is_a_prefix():
    model, params = model_and_params(TINY)
    references = jax.random.normal(jax.random.key(1), (2, 3, 4, 4, 2))
    labels = jnp.array([0, 2])
    whole = condition_of(model, params, labels, references)
    assert whole.shape == (2, 16, 16)
    for count in range(3):
        part = condition_of(model, params, labels, references[:, :count])
        np.testing.assert_allclose(part, whole[:, : 4 * (count + 1)], atol=ROUNDING)


def test_images_trained_at_once_equal_images_one_by_one():
    model, params = model_and_params(TINY)
    copies, rngs = 3, jax.random.split(jax.random.key(2), 3)
    references = jax.random.normal(rngs[0], (2, 3, 4, 4, 2))
    condition = condition_of(model, params, jnp.array([1, 2]), references)
    x = jax.random.normal(rngs[1], (2, 4, copies, 4, 4, 2))
    t = jax.random.uniform(rngs[2], (2, 4, copies))
    rows = x.reshape(-1, 4, 4, 2)
    together = velocity_of(model, params, rows, t.reshape(-1), condition, copies).reshape(x.shape)
    for image in range(4):
        prefix = condition[:, : 4 * (image + 1)]
        for copy in range(copies):
            alone = velocity_of(model, params, x[:, image, copy], t[:, image, copy], prefix)
            np.testing.assert_allclose(together[:, image, copy], alone, atol=ROUNDING)


def test_dropout_needs_a_key_and_changes_the_output():
    config = dataclasses.replace(TINY, attention_dropout=0.5, dropout=0.5)
    model, params = model_and_params(config)
    bound, labels = model.bind(params), jnp.array([0, 1])
    still = bound.condition(labels)
    np.testing.assert_array_equal(still, bound.condition(labels))
    keys = jax.random.split(jax.random.key(0), 2)
    first, second = (bound.condition(labels, rng=key) for key in keys)
    assert np.abs(first - still).max() > 0.01 and np.abs(first - second).max() > 0.01


def test_untrained_model_predicts_zero():
    model = FunctionalModel(TransDiff, TINY)
    params = model.init(jax.random.key(0))
    condition = condition_of(model, params, jnp.array([0]))
    velocity = velocity_of(model, params, jnp.ones((1, 4, 4, 2)), jnp.array([0.5]), condition)
    np.testing.assert_array_equal(velocity, 0)


def test_references_at_512_pixels_are_refused():
    with pytest.raises(ValueError, match=r"there is no such model for 512 pixels"):
        TransDiffConfig(**MRAR, **AT_512_PIXELS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(dim=15), "dim=15 must be a multiple of num_heads=2"),
        (dict(reference_patch_size=3), "latent_size=4 must be a multiple"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)
