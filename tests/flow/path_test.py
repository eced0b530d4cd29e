"""The straight path, its inverse, and the time shift."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.flow.path import interpolate, predict_data, velocity
from dar_jax.flow.times import shift_times, shifted_grid

SHAPE = (3, 4, 4, 2)


@pytest.fixture
def data():
    return jax.random.normal(jax.random.key(0), SHAPE)


@pytest.fixture
def noise():
    return jax.random.normal(jax.random.key(1), SHAPE)


def test_path_leads_from_noise_to_data(data, noise):
    np.testing.assert_array_equal(interpolate(data, noise, jnp.zeros(3)), noise)
    np.testing.assert_array_equal(interpolate(data, noise, jnp.ones(3)), data)


def test_velocity_is_the_derivative_of_the_path(data, noise):
    t = jnp.array([0.1, 0.5, 0.9])
    _, derivative = jax.jvp(lambda t: interpolate(data, noise, t), (t,), (jnp.ones(3),))
    np.testing.assert_allclose(derivative, velocity(data, noise), rtol=1e-6)


def test_predict_data_inverts_the_path(data, noise):
    t = jnp.array([0.0, 0.3, 1.0])
    x_t = interpolate(data, noise, t)
    np.testing.assert_allclose(predict_data(x_t, velocity(data, noise), t), data, atol=1e-6)


def test_every_sample_has_its_own_time(data, noise):
    x_t = interpolate(data, noise, jnp.array([0.0, 1.0, 0.0]))
    np.testing.assert_array_equal(x_t[1], data[1])
    np.testing.assert_array_equal(x_t[2], noise[2])


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.5])
def test_shifted_grid_is_increasing_from_0_to_1(shift):
    grid = shifted_grid(8, shift)
    assert grid.dtype == np.float32
    assert grid[0] == 0.0
    assert grid[-1] == 1.0
    assert np.all(np.diff(grid) > 0)


def test_shift_above_one_goes_towards_the_noise():
    t = np.linspace(0.1, 0.9, 9)
    assert np.all(shift_times(t, 2.0) < t)
    np.testing.assert_array_equal(shift_times(t, 1.0), t)
    np.testing.assert_allclose(shift_times(shift_times(t, 2.0), 0.5), t)
