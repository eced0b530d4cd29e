"""`log_likelihood` and `classify`: meshes, images and codes, real digits, bad input."""

import dataclasses

import jax
import numpy as np
import pytest

from dar_jax.common import image as images
from dar_jax.data.sources import DataConfig, load_source
from dar_jax.kinds.loading import from_pretrained
from dar_jax.models.dar.llama import Llama
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.parallel.sharding import MeshConfig, make_mesh
from dar_jax.pipelines.dar import DarPipeline, PriorPipeline, TokenizerPipeline
from dar_jax.sampling.search import Search
from tests.golden import models
from tests.random_params import random_params

ROUNDING = 1e-5  # eight devices multiply smaller matrices; relative, of some 50 nats an image
NUM_DIGITS = 40
RECOGNISED = 0.6  # of 40 digits, where the model names 9 of 10 and chance is 1 of 10


def make(mesh=None):
    tokenizer = TokenizerPipeline(*models.tokenizer("dar/tokenizer_tiny"), mesh=mesh)
    return DarPipeline(PriorPipeline(*models.prior("dar/gpt_tiny"), mesh=mesh), tokenizer)


@pytest.fixture(scope="module")
def dar():
    return make()


@pytest.fixture(scope="module")
def indices():
    return np.asarray(jax.random.randint(jax.random.key(0), (8, 16), 0, 64))


def test_eight_devices_score_like_one(dar, indices):
    split = make(make_mesh(MeshConfig(data=2, fsdp=4)))
    labels = np.arange(8)
    scored, whole = (each.log_likelihood(indices, labels) for each in (split, dar))
    np.testing.assert_allclose(scored.tokens, whole.tokens, rtol=ROUNDING)
    scores, expected = (each.class_log_likelihoods(indices) for each in (split, dar))
    np.testing.assert_allclose(scores, expected, rtol=ROUNDING)
    assert len(scored.tokens.sharding.device_set) == 8
    assert scored.tokens.addressable_shards[0].data.shape == (1, 16)


def test_images_are_scored_by_their_codes(dar):
    pictures = jax.random.uniform(jax.random.key(1), (2, 32, 32, 3), minval=-1.0)
    codes = dar.tokenizer.encode(pictures)
    scored, expected = (dar.log_likelihood(x, [3, 1]) for x in (pictures, codes))
    np.testing.assert_array_equal(scored.tokens, expected.tokens)
    assert scored.num_pixels == 32 * 32


def test_posterior_is_that_of_equally_likely_classes(dar, indices):
    posterior = dar.classify(indices, microbatch=4)
    scores = np.stack([dar.log_likelihood(indices, [c] * 8).images for c in range(10)], axis=1)
    expected = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(posterior, expected, rtol=1e-3)  # of differences of 60 nats
    np.testing.assert_allclose(posterior.sum(axis=1), 1.0, rtol=ROUNDING)


def test_held_out_digits_are_named():
    dar = from_pretrained("package://mnist")
    test = load_source(DataConfig(source="mnist", image_size=32), "test")
    posterior = dar.classify(images.to_float(test.pixels[:NUM_DIGITS]))
    named = np.argmax(posterior, axis=1) == test.labels[:NUM_DIGITS]
    assert np.mean(named) >= RECOGNISED


@pytest.mark.parametrize(
    ("codes", "labels", "options", "message"),
    [
        (np.zeros((2, 16), int), [3], {}, r"has shape \(2, 16\), expected \(1, 16\)"),
        (np.zeros((2, 15), int), [3, 1], {}, r"has shape \(2, 15\), expected \(B, 16\)"),
        (np.full((2, 16), 64), [3, 1], {}, "64 is out of range"),
        (np.zeros((2, 16), int), [3, 11], {}, "labels: 11 is out of range"),
        (np.zeros((2, 16), int), [3, 1], dict(microbatch=0), "microbatch=0 must divide"),
        (np.zeros((2, 16)), [3, 1], {}, "indices are float64, expected integers"),
        (np.zeros((2, 16, 16, 3), np.uint8), [3, 1], {}, r"has shape \(2, 16, 16, 3\), expected"),
    ],
)
def test_mistakes_are_one_line(dar, codes, labels, options, message):
    with pytest.raises(ValueError, match=message):
        dar.log_likelihood(codes, labels, **options)


def test_captions_have_no_classes(dar, indices):
    captions = PriorPipeline(*models.prior("dar/gpt_t2i_tiny"))
    with pytest.raises(ValueError, match="a model of captions has no classes"):
        DarPipeline(captions, dar.tokenizer).classify(indices)


def test_padding_of_captions_counts_for_nothing(dar, indices):
    config = models.prior("dar/gpt_t2i_tiny")[0].config
    model = FunctionalModel(
        Llama, dataclasses.replace(config, num_tokens=16, vocab_size=64), Compute()
    )
    prior = PriorPipeline(model, random_params(model.abstract_params()))
    captions = DarPipeline(prior, dar.tokenizer)
    features = np.random.default_rng(0).normal(size=(8, 5, 24)).astype(np.float32)
    mask = np.arange(5) >= np.arange(8)[:, None] % 4
    other = np.where(mask[..., None], features, 7.0).astype(np.float32)
    scores = [captions.log_likelihood(indices, x, caption_mask=mask) for x in (features, other)]
    np.testing.assert_allclose(scores[0].tokens, scores[1].tokens, rtol=ROUNDING)
    parts = captions.log_likelihood(indices, features, caption_mask=mask, microbatch=4)
    np.testing.assert_allclose(parts.tokens, scores[0].tokens, rtol=ROUNDING)
    assert np.abs(captions.log_likelihood(indices, other).images - scores[0].images).max() > 0.1
    with pytest.raises(ValueError, match=r"caption_mask has shape \(8, 4\), expected \(8, 5\)"):
        captions.log_likelihood(indices, features, caption_mask=mask[:, 1:])
    # Search asks for the same likelihood, and draws with the same mask.
    search = Search("groups", 2, "likelihood")
    drawn = [
        captions.generate(x, rng=0, caption_mask=mask, search=search).indices
        for x in (features, other)
    ]
    np.testing.assert_array_equal(*drawn)
