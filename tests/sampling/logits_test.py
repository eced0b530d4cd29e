"""Filters against the reference; drawing tokens; guidance schedules."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.sampling.logits import (
    NO_TOKEN,
    SamplingConfig,
    filter_logits,
    guidance_schedule,
    guide,
    sample_token,
    scale_and_filter,
)
from tests.golden import fixtures

NUM_DRAWS = 20_000


def keys(num):
    return jax.random.split(jax.random.key(0), num)


def test_filters_equal_the_reference():
    with fixtures.Compare("dar/sampling_filters") as golden:
        logits, tied = (jnp.asarray(golden.arrays[name]) for name in ("logits", "tied_logits"))
        for name in golden.spec:
            if match := re.fullmatch(r"filtered_k(\d+)_p([\d.]+)", name):
                top_k, top_p = int(match[1]), float(match[2])
                golden.check(name, filter_logits(logits, top_k=top_k, top_p=top_p))
            elif match := re.fullmatch(r"tied_k(\d+)", name):
                golden.check(name, filter_logits(tied, top_k=int(match[1]), top_p=1.0))
            elif match := re.fullmatch(r"probs_(T([\d.]+)_k(\d+)_p([\d.]+))", name):
                config = SamplingConfig(float(match[2]), int(match[3]), float(match[4]))
                probs = jax.nn.softmax(scale_and_filter(logits, config), axis=-1)
                golden.check(name, probs)
                greedy = sample_token(keys(len(logits)), logits, SamplingConfig(temperature=0.0))
                golden.check(f"greedy_{match[1]}", greedy[:, None])


def test_draws_follow_the_filtered_distribution():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    config = SamplingConfig(temperature=0.5, top_k=3)
    rows = jnp.broadcast_to(logits, (NUM_DRAWS, 4))
    tokens = jax.jit(sample_token, static_argnums=2)(keys(NUM_DRAWS), rows, config)
    weights = np.array([0.5, 0.3, 0.15, 0.0]) ** 2
    shares = np.bincount(tokens, minlength=4) / NUM_DRAWS
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.015)


def test_a_draw_depends_on_its_own_key_only():
    logits = jax.random.normal(jax.random.key(1), (6, 50))
    rngs = keys(6)
    tokens = sample_token(rngs, logits, SamplingConfig())
    np.testing.assert_array_equal(sample_token(rngs[3:], logits[3:], SamplingConfig()), tokens[3:])
    assert tokens.dtype == jnp.int32


def test_temperature_zero_is_greedy():
    logits = jax.random.normal(jax.random.key(1), (6, 50))
    tokens = sample_token(keys(6), logits, SamplingConfig(temperature=0.0, top_k=5))
    np.testing.assert_array_equal(tokens, jnp.argmax(logits, axis=-1))


def test_one_compiled_program_takes_every_temperature():
    logits, rngs, traced = jax.random.normal(jax.random.key(1), (6, 50)), keys(6), []

    @jax.jit
    def sample(config):
        traced.append(config)
        return sample_token(rngs, logits, config)

    rows = [sample(SamplingConfig(temperature)) for temperature in (0.0, 0.7, 1.0, 3.0)]
    assert len(traced) == 1
    for temperature, row in zip((0.0, 0.7, 1.0, 3.0), rows, strict=True):
        np.testing.assert_array_equal(row, sample_token(rngs, logits, SamplingConfig(temperature)))
    assert np.any(rows[0] != rows[-1])


def test_guide_extrapolates_from_the_unconditional_logits():
    conditional, unconditional = jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 3.0]])
    scales = jnp.array([0.0, 1.0, 3.0])
    guided = [guide(conditional, unconditional, scale)[0] for scale in scales]
    np.testing.assert_array_equal(guided, [[0, 3], [1, 2], [3, 0]])


def test_interval_ends_guidance():
    schedule = guidance_schedule(3.0, 8, interval=2)
    np.testing.assert_array_equal(schedule, [3, 3, 3, 3, 1, 1, 1, 1])


def test_pair_of_positions_limits_guidance():
    schedule = guidance_schedule((2.0, 9.0), 8, interval=(2, 4))
    np.testing.assert_array_equal(schedule, [1, 1, 4, 5, 6, 1, 1, 1])
    same = [guidance_schedule(3.0, 8, interval=interval) for interval in (2, (0, 3), [0, 3])]
    np.testing.assert_array_equal(same, np.broadcast_to(same[0], (3, 8)))


def test_cosine_rises_slowly_at_both_ends():
    schedule = guidance_schedule((2.0, 8.0), 5, schedule="cosine")
    slow = 3 * (1 - np.sqrt(0.5))
    np.testing.assert_allclose(schedule, [2, 2 + slow, 5, 8 - slow, 8], rtol=1e-6)
    np.testing.assert_array_equal(guidance_schedule(4.0, 5, schedule="cosine"), 4.0)


def test_scales_may_be_any_sequence():
    expected = guidance_schedule((1.1, 8.0), 6)
    np.testing.assert_array_equal(guidance_schedule([1.1, 8.0], 6), expected)
    np.testing.assert_array_equal(guidance_schedule((4,), 6), guidance_schedule(4.0, 6))


@pytest.mark.parametrize(
    ("scale", "options", "message"),
    [
        ((1.0, 2.0, 3.0), {}, r"guidance_scale=\(1.0, 2.0, 3.0\) must be one scale or"),
        (2.0, {"schedule": "quadratic"}, "'quadratic' must be one of linear, cosine"),
        (2.0, {"interval": (4, 2)}, r"guidance_interval=\(4, 2\) must be"),
        (2.0, {"interval": (0, 8)}, "0 <= first <= last < 8"),
        (2.0, {"interval": (1, 2, 3)}, r"guidance_interval=\(1, 2, 3\)"),
        (float("nan"), {}, "guidance_scale=nan must be at least 1"),
    ],
)
def test_no_such_guidance_is_refused(scale, options, message):
    with pytest.raises(ValueError, match=message):
        guidance_schedule(scale, 8, **options)


@pytest.mark.parametrize("scale", [0.5, (3.0, 0.5), (0.5, 3.0)])
def test_guidance_below_one_is_refused(scale):
    with pytest.raises(ValueError, match=re.escape(f"guidance_scale={scale} must be at least 1")):
        guidance_schedule(scale, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=-1.0), "temperature=-1.0 must be at least 0"),
        (dict(top_k=-1), "top_k=-1 must be at least 0"),
        (dict(top_p=0.0), "top_p=0.0 must be in"),
        (dict(top_p=1.5), "top_p=1.5 must be in"),
    ],
)
def test_sampling_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_logits_that_are_not_finite_give_no_token(bad, temperature):
    logits = jnp.zeros((3, 5)).at[1, 2].set(bad)
    tokens = sample_token(keys(3), logits, SamplingConfig(temperature))
    assert tokens[1] == NO_TOKEN and min(tokens[0], tokens[2]) >= 0
