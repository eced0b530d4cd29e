"""Decoding with caches in groups: a sample depends on its condition, key and prefix only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.models.dar import sampler
from dar_jax.nn.stack import unstack
from dar_jax.sampling import autoregressive
from dar_jax.sampling.autoregressive import Decoder
from dar_jax.sampling.logits import SamplingConfig, guidance_schedule
from tests.golden import models

FOLDERS = ("dar/gpt_tiny", "dar/gpt_gqa_tiny", "dar/gpt_t2i_tiny")
SAMPLING = SamplingConfig(temperature=0.9)
PREFIX_LENGTH = 5


def unstacked(folder):
    model, params = models.prior(folder)
    return model.unstacked(), unstack(params)


def conditions(config, batch_size):
    """Labels, or captions and their validity; the first ones are padded."""
    if config.caption_dim is None:
        return jnp.arange(batch_size) % config.num_classes, None
    shape = (batch_size, config.condition_tokens, config.caption_dim)
    padding = jnp.maximum(2 - jnp.arange(batch_size), 0)[:, None]
    valid = jnp.arange(config.condition_tokens) >= padding
    return jax.random.normal(jax.random.key(1), shape), valid


def generate(folder, rows, *, scale=1.0, **options):
    """Last yield of the prior's decoding for some rows of a batch of 16 conditions."""
    model, params = unstacked(folder)
    condition, valid = conditions(model.config, 16)
    rngs = jax.random.split(jax.random.key(0), 16)
    scales = guidance_schedule(scale, model.config.num_tokens)
    key_mask = None if valid is None else valid[rows]
    return list(
        sampler.generate_indices(
            model,
            params,
            condition[rows],
            rngs[rows],
            scales,
            sampling=SAMPLING,
            key_mask=key_mask,
            **options,
        )
    )[-1]


@pytest.mark.parametrize("folder", FOLDERS)
def test_prefix_continues_as_if_it_had_been_drawn(folder):
    rows = slice(0, 3)
    tokens = generate(folder, rows, scale=2.0)
    prefix = tokens[:, :PREFIX_LENGTH]
    continued = generate(folder, rows, scale=2.0, prefix=prefix)
    np.testing.assert_array_equal(continued, tokens)
    other = generate(folder, rows, scale=2.0, prefix=prefix.at[:, 1].add(1) % 40)
    assert np.any(other[:, PREFIX_LENGTH:] != tokens[:, PREFIX_LENGTH:])


@pytest.mark.parametrize("folder", ["dar/gpt_tiny", "dar/gpt_t2i_tiny"])
def test_tokens_of_an_image_do_not_depend_on_the_batch(folder):
    small, large = (generate(folder, slice(0, size), scale=2.0) for size in (4, 16))
    np.testing.assert_array_equal(small, large[:4])
    assert len(np.unique(large, axis=0)) == 16


def test_groups_yield_the_tokens_so_far():
    folder = "dar/gpt_tiny"
    model, params = unstacked(folder)
    whole = generate(folder, slice(0, 2))
    condition, _ = conditions(model.config, 16)
    groups = sampler.generate_indices(
        model,
        params,
        condition[:2],
        jax.random.split(jax.random.key(0), 16)[:2],
        guidance_schedule(1.0, 16),
        sampling=SAMPLING,
        prefix=whole[:, :6],
        boundaries=(4, 7, 8, 16),
    )
    for tokens, length in zip(groups, (4, 7, 8, 16), strict=True):
        np.testing.assert_array_equal(tokens, whole[:, :length])


def test_guidance_of_one_equals_no_guidance():
    model, params = unstacked("dar/gpt_tiny")
    config = model.config
    condition = jnp.arange(3)
    rngs = jax.random.split(jax.random.key(0), 3)
    scales = np.ones(config.num_tokens, np.float32)
    scales[-1] = 2.0  # keeps the unconditional rows to the end
    results = []
    for guided in (False, True):
        decoder = Decoder(model, config.condition_tokens, SAMPLING, guided)
        rows = sampler.embed_rows(model, params, condition, guided=guided)
        assert len(rows) == (6 if guided else 3)
        (tokens,) = autoregressive.generate(
            decoder,
            params,
            rows,
            jnp.zeros((3, 0), jnp.int32),
            rngs,
            scales,
            boundaries=(config.num_tokens,),
        )
        results.append(tokens[:, :-1])
    np.testing.assert_array_equal(*results)


def test_grow_pads_the_slots_with_zeros():
    caches = {"a": jnp.ones((1, 2, 3, 4)), "b": jnp.ones((1, 1, 3, 2))}
    grown = autoregressive.grow(caches, 5)
    assert grown["a"].shape == (1, 2, 5, 4)
    np.testing.assert_array_equal(grown["b"][0, 0, :, 0], [1, 1, 1, 0, 0])
