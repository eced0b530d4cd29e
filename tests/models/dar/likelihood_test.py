"""Likelihood of codes: it sums to 1, and full passes, cached ones and microbatches agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.models.dar import likelihood
from dar_jax.models.dar.decoding import decoding_params
from dar_jax.models.dar.llama import Llama, LlamaConfig
from dar_jax.nn.functional_model import FunctionalModel
from tests.golden import models
from tests.models.dar.llama_test import cached_logits
from tests.random_params import random_params

ROUNDING = 1e-5  # sums of 25 float32 probabilities; full and cached passes add in another order
TOY = LlamaConfig(
    num_layers=1,
    num_heads=1,
    dim=8,
    ffn_dim=8,
    vocab_size=5,
    num_tokens=2,
    num_classes=3,
)


@pytest.fixture(scope="module")
def prior():
    return models.prior("dar/gpt_tiny")


@pytest.fixture(scope="module")
def rows(prior):
    config = prior[0].config
    shape = (4, config.num_tokens)
    indices = jax.random.randint(jax.random.key(0), shape, 0, config.vocab_size)
    return jnp.array([3, 1, 0, config.num_classes]), indices


def test_probabilities_of_all_codes_sum_to_one():
    model = FunctionalModel(Llama, TOY)
    params = random_params(model.abstract_params())
    codes = jnp.stack(jnp.meshgrid(*[jnp.arange(TOY.vocab_size)] * 2), axis=-1).reshape(-1, 2)
    scores = likelihood.class_log_likelihoods(model, params, codes)
    assert scores.shape == (25, TOY.num_classes)
    np.testing.assert_allclose(jnp.exp(scores).sum(axis=0), 1.0, atol=ROUNDING)
    assert np.ptp(np.exp(scores)) > 0.01  # not a uniform model, which would sum to 1 as well


def test_likelihood_equals_that_of_cached_decoding(prior, rows):
    (model, params), (labels, indices) = prior, rows
    logits = cached_logits(model.unstacked(), decoding_params(params), labels, indices)
    cached = jnp.take_along_axis(jax.nn.log_softmax(logits), indices[..., None], axis=2)
    tokens = likelihood.token_log_likelihood(model, params, labels, indices)
    np.testing.assert_allclose(tokens, cached[..., 0], atol=ROUNDING)


def test_a_prefix_has_the_likelihood_of_its_tokens(prior, rows):
    (model, params), (labels, indices) = prior, rows
    tokens = likelihood.token_log_likelihood(model, params, labels, indices)
    first = likelihood.token_log_likelihood(model, params, labels, indices[:, :5])
    np.testing.assert_allclose(tokens[:, :5], first, atol=ROUNDING)


def test_classes_and_microbatches_are_those_of_single_passes(prior, rows):
    (model, params), (_, indices) = prior, rows
    scores = likelihood.class_log_likelihoods(model, params, indices, microbatch=2)
    for label in (0, 7):
        labels = jnp.full(len(indices), label)
        tokens = likelihood.token_log_likelihood(model, params, labels, indices)
        np.testing.assert_allclose(scores[:, label], tokens.sum(axis=1), rtol=ROUNDING)


def test_bits_ranks_and_deviation_follow_from_the_tokens():
    tokens = -np.log(2) * np.array([[4.0, 4.0], [1.0, 1.0], [2.0, 4.0]], np.float32)
    scored = likelihood.LogLikelihood(jnp.asarray(tokens), num_pixels=4)
    np.testing.assert_allclose(scored.bits_per_pixel, [2.0, 0.5, 1.5], rtol=ROUNDING)
    assert np.argsort(-scored.images).tolist() == [1, 2, 0]
    known = likelihood.LogLikelihood(jnp.asarray(tokens[1:] / np.log(2)), num_pixels=4)
    nats = -tokens.mean(axis=1)
    expected = (nats - 2.0) / 1.0  # the others have 1 and 3 nats a token
    np.testing.assert_allclose(scored.deviation_from(known), expected, rtol=ROUNDING)
