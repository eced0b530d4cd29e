"""Random keys of images."""

import numbers

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.common.checks import check_number, check_seed
from dar_jax.common.typing import PRNGKeyArray, PRNGKeys

MAX_INDEX = 2**31
"""Indices of images that are folded into a key stay below."""


def image_keys(rng: PRNGKeyArray | int | None, num_images: int, first: int = 0) -> PRNGKeys:
    """One key per image index, whatever the batch, of a key or a seed.

    Raises:
        ValueError: there is none, or it is something else, or an index is out of range.
    """
    check_number("first_index", first, numbers.Integral)
    if not 0 <= first <= MAX_INDEX - num_images:
        raise ValueError(f"first_index={first} must be in 0..{MAX_INDEX - num_images}")
    indices = first + jnp.arange(num_images)
    return jax.vmap(jax.random.fold_in, (None, 0))(_checked(rng), indices)


def _checked(rng: PRNGKeyArray | int | None) -> PRNGKeyArray:
    if isinstance(rng, int | np.integer) and not isinstance(rng, bool):
        check_seed("rng", int(rng))
        return jax.random.key(rng)
    if not isinstance(rng, jax.Array) or not (
        jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) or rng.dtype == jnp.uint32
    ):
        what = "is missing" if rng is None else f"is no key but {rng!r}"
        raise ValueError(f"rng {what}: pass rng=jax.random.key(seed), or a seed")
    if rng.ndim != (rng.dtype == jnp.uint32):  # keys that are arrays of numbers have one axis
        raise ValueError(f"rng holds keys of shape {rng.shape}: pass one, jax.random.key(seed)")
    return rng
