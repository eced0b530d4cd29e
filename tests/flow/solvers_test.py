"""Solvers on equations with known solutions: order, previews, a Gaussian's marginals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.flow import solvers
from dar_jax.flow.times import shifted_grid

ORDERS = {"euler": 1, "adams_bashforth2": 2}
CONDITION = 2.0


def uniform_times(num_steps):
    return np.linspace(0, 1, num_steps + 1, dtype=np.float32)


def integrate(velocity, x, times, solver, conditions=None):
    if conditions is None:
        conditions = jnp.zeros(len(times) - 1)
    return solvers.integrate(velocity, x, times, conditions, solver=solver)


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_error_falls_with_the_order_of_the_solver(solver):
    def velocity(x, t, _):
        return -x * jnp.cos(3 * t)[:, None]  # x(t) = x(0) exp(-sin(3 t) / 3)

    x = jnp.ones((2, 1))
    exact = np.exp(-np.sin(3) / 3)
    errors = [
        np.max(np.abs(integrate(velocity, x, uniform_times(n), solver).x - exact)) for n in (16, 32)
    ]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[solver], abs=0.25)


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_constant_velocity_is_exact(solver):
    x = jnp.array([[1.0, 2.0]])
    solution = integrate(lambda x, t, _: jnp.full_like(x, 3.0), x, shifted_grid(5, 2.0), solver)
    np.testing.assert_allclose(solution.x, x + 3.0, rtol=1e-6)
    # On a straight path every preview is the result.
    np.testing.assert_allclose(solution.previews, np.broadcast_to(x + 3.0, (5, 1, 2)), rtol=1e-6)


def test_first_preview_is_one_euler_step_and_the_last_the_result():
    x = jnp.ones((1, 3))
    solution = integrate(lambda x, t, _: -x, x, uniform_times(4), "adams_bashforth2")
    np.testing.assert_allclose(solution.previews[0], 0.0, atol=1e-7)
    np.testing.assert_array_equal(solution.previews[-1], solution.x)


def test_adams_bashforth_uses_the_previous_velocity():
    solution = integrate(
        lambda x, t, condition: jnp.full_like(x, condition),
        jnp.zeros((1, 1)),
        np.float32([0.0, 0.2, 0.5, 1.0]),
        "adams_bashforth2",
        conditions=jnp.array([1.0, 10.0, 100.0]),
    )
    expected = 0.2 * 1 + 0.3 * (15 - 0.5) + 0.5 * (150 - 5)
    assert solution.x.item() == pytest.approx(expected, rel=1e-6)


def test_single_steps_equal_the_integration():
    def velocity(x, t, condition):
        return condition - x * t[:, None]

    x = jax.random.normal(jax.random.key(0), (2, 3))
    times, conditions = shifted_grid(4, 2.0), jnp.arange(4.0)
    table = solvers.coefficients("adams_bashforth2", 4)
    state, previews = solvers.start(x), []
    for i in range(4):
        step = jnp.asarray(times[i]), jnp.asarray(times[i + 1]), conditions[i]
        state, preview = solvers.step(velocity, state, *step, table.select(i))
        previews.append(preview)
    solution = integrate(velocity, x, times, "adams_bashforth2", conditions)
    np.testing.assert_allclose(state.x, solution.x, rtol=1e-6)
    np.testing.assert_allclose(jnp.stack(previews), solution.previews, rtol=1e-6)


def test_constraint_holds_after_every_step_and_steers_the_rest():
    seen = []

    def velocity(x, t, _):
        seen.append(x)
        return jnp.broadcast_to(x[:, :1], x.shape)  # all follow the first component

    def constraint(x, t):
        return x.at[:, 0].set(10 * t)

    state = solvers.start(jnp.zeros((2, 2)))
    euler = solvers.coefficients("euler", 1).select(0)
    for step in jnp.stack([uniform_times(4)[:-1], uniform_times(4)[1:]], axis=1):
        state, _ = solvers.step(velocity, state, *step, None, euler, constraint)
    np.testing.assert_array_equal(np.stack(seen)[:, :, 0], np.repeat([[0, 2.5, 5, 7.5]], 2, 0).T)
    np.testing.assert_array_equal(state.x, np.repeat([[10, 0.25 * 15]], 2, 0))


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_gaussian_velocity_transports_noise_to_the_data(solver):
    mean, std = 3.0, 0.5
    num_steps = {"euler": 400, "adams_bashforth2": 100}[solver]

    def velocity(x, t, _):
        # E[data - noise | x_t] for data ~ N(mean, std^2) and independent noise ~ N(0, 1).
        t = t[:, None]
        variance = (t * std) ** 2 + (1 - t) ** 2
        return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)

    noise = jnp.linspace(-3, 3, 61)[:, None]
    data = integrate(velocity, noise, uniform_times(num_steps), solver).x
    # The flow map between Gaussians on a straight path is affine and keeps the quantiles.
    np.testing.assert_allclose(data, mean + std * noise, atol=0.01)


def test_state_is_float32():
    x = jnp.ones((1, 2), jnp.bfloat16)
    solution = integrate(lambda x, t, _: x.astype(jnp.bfloat16), x, uniform_times(2), "euler")
    assert solution.x.dtype == jnp.float32


def test_unknown_solver_is_refused():
    with pytest.raises(ValueError, match="solver 'heun' must be one of euler, adams_bashforth2"):
        solvers.coefficients("heun", 3)
