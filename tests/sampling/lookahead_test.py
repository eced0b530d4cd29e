"""A draft that guesses for look-ahead: the same tokens, in as few calls as it is right."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dar_jax.models.dar import draws
from dar_jax.models.dar.decoding import decoding_params
from dar_jax.models.dar.llama import Llama
from dar_jax.models.dar.options import DarSampling
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.sampling.lookahead import decode_ahead
from tests.golden import models

CLASSES, GROUPED, CAPTIONS = "dar/gpt_tiny", "dar/gpt_gqa_tiny", "dar/gpt_t2i_tiny"
GROUPS = {"boundaries": (4, 7, 8, 16)}
RAMP = {"guidance_scale": (1.0, 5.0)}
INTERVAL = {"guidance_scale": 3.0, "guidance_interval": (0, 5)}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
NUM_TOKENS, PREFIX_LENGTH = 16, 5  # of an image of `CLASSES`, and of a prefix


def prior(folder):
    model, params = models.prior(folder)
    return model.unstacked(), decoding_params(params)


def draft_of(folder, **changes):
    """A prior of one narrow layer over the same tokens, of random weights, that is often wrong."""
    config = models.prior(folder)[0].config
    small = dict(num_layers=1, num_heads=2, num_kv_heads=None, dim=8, ffn_dim=16)
    model = FunctionalModel(Llama, dataclasses.replace(config, **(small | changes)))
    params = model.init(jax.random.key(7))
    noise = nnx.initializers.normal(0.5)  # logits start at zero
    params["output"]["kernel"] = noise(jax.random.key(8), params["output"]["kernel"].shape)
    return model.unstacked(), decoding_params(params)


def distorted(folder):
    """The prior itself with other output weights: it guesses right about every other time."""
    model, params = prior(folder)
    kernel = params["output"]["kernel"]
    noise = jax.random.normal(jax.random.key(9), kernel.shape) * jnp.std(kernel)
    return model, {**params, "output": {"kernel": kernel + noise}}


def draw(folder, num_images, draft=None, *, boundaries=None, prefix=None, **options):
    """Tokens of some images, and the calls that each took, none without look-ahead."""
    model, params = prior(folder)
    config, valid, calls = model.config, None, []
    condition = jnp.arange(num_images) % config.num_classes
    if config.caption_dim is not None:
        shape = (num_images, config.condition_tokens, config.caption_dim)
        condition = jax.random.normal(jax.random.key(1), shape)
        padding = jnp.maximum(2 - jnp.arange(num_images), 0)[:, None]
        valid = jnp.arange(config.condition_tokens) >= padding

    def run(function, *arguments, **keywords):
        result = function(*arguments, **keywords)
        if function is decode_ahead:
            calls.append(result.calls)
        return result

    rngs = jax.random.split(jax.random.key(0), num_images)
    sampling = DarSampling(**options)
    given = dict(prefix=prefix, boundaries=boundaries, key_mask=valid, draft=draft, run=run)
    *_, tokens = draws.generate_indices(model, params, condition, rngs, sampling, **given)
    return np.asarray(tokens), np.asarray(calls[-1]) if calls else None


@pytest.mark.parametrize(
    ("guesses", "folder", "num_images", "options"),
    [
        (distorted, CLASSES, 3, {"lookahead": 4, **RAMP, **GROUPS}),
        (draft_of, CLASSES, 1, {"lookahead": 2, "temperature": 0.0, "guidance_scale": 2.0}),
        slow(distorted, CLASSES, 2, {"lookahead": 2, "temperature": 0.5}),
        slow(draft_of, GROUPED, 1, {"lookahead": 8, "temperature": 0.5}),
        slow(distorted, GROUPED, 3, {"lookahead": 3, "temperature": 0.0}),
        (draft_of, CAPTIONS, 3, {"lookahead": 3, "guidance_scale": 2.0}),
        (distorted, CLASSES, 2, {"lookahead": 6, **INTERVAL, **GROUPS}),
    ],
)
def test_draft_changes_no_token(guesses, folder, num_images, options):
    tokens, _ = draw(folder, num_images, **{**options, "lookahead": 0})
    draft = guesses(folder)
    np.testing.assert_array_equal(draw(folder, num_images, draft, **options)[0], tokens)
    given = jnp.asarray(tokens[:, :PREFIX_LENGTH])
    continued, _ = draw(folder, num_images, draft, prefix=given, **options)
    np.testing.assert_array_equal(continued, tokens)


@pytest.mark.parametrize("num_given", [0, 1, PREFIX_LENGTH])
@pytest.mark.parametrize(
    ("folder", "num_images", "window", "options"),
    [
        (CLASSES, 3, 4, RAMP),
        slow(CLASSES, 1, 2, {"temperature": 0.5}),
        slow(GROUPED, 2, 5, {"temperature": 0.0}),
        slow(CAPTIONS, 3, 3, {"guidance_scale": 2.0}),
    ],
)
def test_model_that_guesses_for_itself_is_always_right(
    folder, num_images, window, options, num_given
):
    """A cache of the draft with a hole or a wrong slot would guess otherwise."""
    tokens, _ = draw(folder, num_images, **options)
    given = jnp.asarray(tokens[:, :num_given])
    options = {**options, "lookahead": window, "prefix": given}
    num_drawn = tokens.shape[1] - num_given - 1
    for boundaries in (None, (4, 7, tokens.shape[1])):
        drawn, calls = draw(folder, num_images, prior(folder), boundaries=boundaries, **options)
        np.testing.assert_array_equal(drawn, tokens)
        assert calls.tolist() == [math.ceil(num_drawn / window)] * num_images


def test_images_keep_what_a_draft_guesses_right_while_others_go_on():
    """A draft that is right for one class only: its image never waits, whatever the batch."""
    model, params = prior(CLASSES)
    embed = params["condition_embed"]["embedding"]
    spoilt = {**params, "condition_embed": {"embedding": embed.at[1:].multiply(-3.0)}}
    options = dict(lookahead=4, boundaries=(4, 8, 12, NUM_TOKENS))
    tokens, calls = draw(CLASSES, 3, (model, spoilt), **options)
    np.testing.assert_array_equal(tokens, draw(CLASSES, 3)[0])
    assert calls[0] == math.ceil((NUM_TOKENS - 1) / 4) < min(calls[1:])


def test_distilled_draft_guesses_in_one_row_for_a_model_of_two():
    options = dict(guidance_scale=3.0, lookahead=4, boundaries=(8, NUM_TOKENS))
    tokens, calls = draw(CLASSES, 2, draft_of(CLASSES, max_guidance=8.0), **options)
    np.testing.assert_array_equal(tokens, draw(CLASSES, 2, **{**options, "lookahead": 0})[0])
    assert np.all(calls < NUM_TOKENS)
