"""The straight path from noise (t = 0) to data (t = 1) (Lipman et al. 2022, Liu et al. 2022).

    x_t = t * data + (1 - t) * noise        velocity = d x_t / dt = data - noise
    data = x_t + (1 - t) * velocity         noise = x_t - t * velocity
    score = d log p_t(x_t) / d x_t = (t * velocity - x_t) / (1 - t)

Times have shape [B] and broadcast over the other axes of `data`.
"""

import jax.numpy as jnp

from dar_jax.common.typing import Array, Float


def interpolate(
    data: Float[Array, "B ..."], noise: Float[Array, "B ..."], t: Float[Array, " B"]
) -> Float[Array, "B ..."]:
    """Return x_t."""
    t = _broadcast(t, data.ndim)
    return t * data + (1 - t) * noise


def velocity(data: Float[Array, "B ..."], noise: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Return the regression target."""
    return data - noise


def predict_data(
    x_t: Float[Array, "B ..."], velocity: Float[Array, "B ..."], t: Float[Array, " B"]
) -> Float[Array, "B ..."]:
    """Return the data that a velocity at (x_t, t) points to."""
    return x_t + (1 - _broadcast(t, x_t.ndim)) * velocity


def score(
    x_t: Float[Array, "B ..."], velocity: Float[Array, "B ..."], t: Float[Array, " B"]
) -> Float[Array, "B ..."]:
    """Return the score that belongs to a velocity at (x_t, t), t < 1."""
    t = _broadcast(t, x_t.ndim)
    return (t * velocity - x_t) / (1 - t)


def _broadcast(t: Array, ndim: int) -> Array:
    return jnp.reshape(t, (-1,) + (1,) * (ndim - 1))
