"""Keeping batches split over devices, cutting them to save memory, and summing their gradients.

Where weights are split over the same devices as the batch (FSDP), XLA may well choose to split the
widths of activations instead, and to gather whole batches on every device: it did for the D-AR
prior, 30 times the bytes of gathering the weights. A model says here which arrays have a leading
batch axis; how a batch is split, if at all, the trainer says.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import einops
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from dar_jax.common.typing import Array, Float

_BATCH_SHARDING = contextvars.ContextVar[NamedSharding | None]("batch_sharding", default=None)
_GRADIENT_DTYPE = contextvars.ContextVar[DTypeLike | None]("gradient_dtype", default=None)


@contextlib.contextmanager
def batch_split(sharding: NamedSharding) -> Iterator[None]:
    """Trace with batches split as `sharding` says of their leading axis."""
    token = _BATCH_SHARDING.set(sharding)
    try:
        yield
    finally:
        _BATCH_SHARDING.reset(token)


def batch_sharding() -> NamedSharding | None:
    """Return how the leading axis of batches is split, if that is known."""
    return _BATCH_SHARDING.get()


def keep_batch_split(x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Return x, its leading axis split as the batch; the others are left to XLA."""
    sharding = _BATCH_SHARDING.get()
    if sharding is None:
        return x
    free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    where = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec, *free))
    return jax.lax.with_sharding_constraint(x, where)


@contextlib.contextmanager
def gradients_summed_in(dtype: DTypeLike) -> Iterator[None]:
    """Trace with the gradients of kernels and biases summed over the batch in `dtype`."""
    token = _GRADIENT_DTYPE.set(dtype)
    try:
        yield
    finally:
        _GRADIENT_DTYPE.reset(token)


def gradient_dtype() -> jnp.dtype:
    """Return the dtype that gradients are summed in: float32 unless something else is asked for."""
    return jnp.dtype(_GRADIENT_DTYPE.get() or jnp.float32)


def in_parts(function: Callable[..., Array], microbatch: int | None) -> Callable[..., Array]:
    """Return the function of arrays [B, ...], evaluated on `microbatch` rows at a time.

    Args:
        function: treats the rows of its arguments independently.
        microbatch: a divisor of B; None evaluates all rows at once.
    """

    def mapped(*batch: Array) -> Array:
        # Rows of one part lie far apart, so that a batch split over devices stays split.
        split, merge = "(b parts) ... -> parts b ...", "parts b ... -> (b parts) ..."
        parts = [einops.rearrange(array, split, b=microbatch) for array in batch]
        return einops.rearrange(jax.lax.map(lambda part: function(*part), parts), merge)

    return function if microbatch is None else mapped
