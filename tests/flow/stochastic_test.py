"""Euler-Maruyama, guidance, scores and logit-normal times, on the reference's toy velocity."""

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.flow import solvers
from dar_jax.flow.guidance import ALWAYS, guide
from dar_jax.flow.path import score
from dar_jax.flow.times import logit_normal_times, stochastic_grid
from tests.golden import fixtures

FOLDER = "transdiff/sampler_unit"
ROUNDING = 1e-5  # two orders of the same sums of numbers of about 1


def toy_velocity(matrix):
    """The reference's toy, noise - data at time 1000 (1 - t), in our convention."""

    def velocity(x, t, condition):
        return -(x @ matrix + 0.5 * jnp.sin(condition) + (1 - t)[:, None, None])

    return velocity


def test_sampler_equals_the_reference():
    with fixtures.Compare(FOLDER) as golden:
        arrays = {name: jnp.asarray(array) for name, array in golden.arrays.items()}
        velocity = toy_velocity(arrays["A"])
        pair = jnp.stack([arrays["c"], arrays["c_uncond"]])
        both = einops.rearrange(pair, "two b ... -> (b two) ...")
        for run in fixtures.load_json(FOLDER, "config")["runs"]:
            times, condition, field = stochastic_grid(run["num_steps"]), arrays["c"], velocity
            if run["cfg_scale"] > 1:
                # The reference counts from the data.
                interval = 1 - run.get("guidance_high", 1.0), 1 - run.get("guidance_low", 0.0)
                field, condition = guide(velocity, run["cfg_scale"], interval), both
            steps = solvers.euler_maruyama(
                times, drift_scale=run["scale_0"], noise_scale=run["scale_1"]
            )
            noise = arrays["step_noise"]
            state, _ = solvers.advance(
                lambda x, t, _, field=field, condition=condition: field(x, t, condition),
                solvers.start(arrays["noise"]),
                times,
                None,
                steps,
                step_noise=noise.__getitem__,
            )
            golden.check(f"out_{run['name']}", state.x)
        for num_steps in (1, 5, 9, 20):
            golden.check(f"t_grid_{num_steps}", 1 - stochastic_grid(num_steps))
        # Velocity and time change their signs, the score does not.
        t = 1 - arrays["score_t"]
        golden.check("score_linear", score(arrays["score_x"], -arrays["score_v"], t))


def test_guided_velocity_is_the_guided_drift():
    def velocity(x, t, condition):
        return jnp.tanh(x + condition) * (2 - t)[:, None]

    def drift(x, t, condition):
        v = velocity(x, t, condition)
        w = 2 * (1 - t)[:, None]
        return v + w / 2 * score(x, v, t)

    rngs = jax.random.split(jax.random.key(0), 2)
    x, condition = jax.random.normal(rngs[0], (3, 4)), jax.random.normal(rngs[1], (6, 4))
    t = jnp.array([0.0, 0.4, 0.9])
    v = guide(velocity, 1.7, ALWAYS)(x, t, condition)
    of_velocity = (1 + t)[:, None] * v - x
    np.testing.assert_allclose(
        guide(drift, 1.7, ALWAYS)(x, t, condition), of_velocity, atol=ROUNDING
    )


def test_guidance_interval_includes_both_ends():
    guided = guide(lambda x, t, condition: condition, 3.0, (0.25, 0.5))
    t = jnp.array([0.2, 0.25, 0.4, 0.5, 0.6])
    condition = jnp.tile(jnp.array([[2.0], [1.0]]), (5, 1))
    out = guided(jnp.zeros((5, 1)), t, condition)
    np.testing.assert_array_equal(out[:, 0], [2, 4, 4, 4, 2])


def test_stochastic_run_has_the_marginals_of_the_data():
    mean, std, num_images = 2.0, 0.5, 4096

    def velocity(x, t, _):
        t = t[:, None]
        variance = (t * std) ** 2 + (1 - t) ** 2
        return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)

    rng_start, rng_steps = jax.random.split(jax.random.key(0))
    times = stochastic_grid(200)
    state, preview = solvers.advance(
        velocity,
        solvers.start(jax.random.normal(rng_start, (num_images, 1))),
        times,
        None,
        solvers.euler_maruyama(times),
        step_noise=lambda i: jax.random.normal(jax.random.fold_in(rng_steps, i), (num_images, 1)),
    )
    standard_error = std / num_images**0.5
    assert abs(np.mean(state.x) - mean) < 4 * standard_error
    # The grid ends with one deterministic step of 0.04.
    assert np.std(state.x) == pytest.approx(std, rel=0.05)
    assert np.std(preview) == pytest.approx(std, rel=0.05)


def test_logit_normal_times_are_quantised_towards_the_data():
    normals = jnp.linspace(-8, 8, 1001)
    t = logit_normal_times(normals)
    coarse = logit_normal_times(normals, 10)
    levels = 10 * (1 - coarse)
    np.testing.assert_allclose(levels, np.round(levels), atol=ROUNDING)
    assert np.all(coarse >= t - ROUNDING) and np.all(coarse - t < 0.1 + ROUNDING)
    assert np.all(np.diff(t) < 0)  # large draws are near the noise
    assert levels.max() == pytest.approx(9)  # pure noise is never trained on
