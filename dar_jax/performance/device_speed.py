"""What one device does at best: memory bandwidth and matrix FLOP/s, measured where it runs.

Both are the best of several repeats of programs that do nothing else. A model cannot pass them
unless it fits in a cache.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PROBE_BYTES = 2**29
"""Far more than any cache holds."""
MATMUL_SIZES = {"cpu": 2048}
LARGE_MATMUL_SIZE = 8192
"""Accelerators need this much to hide the launch."""
REPEATS = 10


@dataclasses.dataclass(frozen=True)
class DeviceSpeed:
    """Measured speed of one device.

    Attributes:
        bandwidth: bytes/s at which the memory can be read, as decoding reads its weights: the
            better one of a sum and a matrix-vector product.
        product_bandwidth: bytes/s of the matrix-vector product.
        flops: FLOP/s of a matrix product.
    """

    bandwidth: float
    product_bandwidth: float
    flops: float

    def seconds(self, num_bytes: int, num_flops: float) -> float:
        """Least time to move the bytes and do the FLOPs, one hidden behind the other."""
        return max(num_bytes / self.bandwidth, num_flops / self.flops)


def measure(dtype: jnp.dtype) -> DeviceSpeed:
    """Measure the default device at a dtype."""
    size = MATMUL_SIZES.get(jax.default_backend(), LARGE_MATMUL_SIZE)
    product = _product_bandwidth(dtype, size)
    return DeviceSpeed(
        # On CPU one product alone does not saturate the memory.
        bandwidth=max(product, _sum_bandwidth(dtype)),
        product_bandwidth=product,
        flops=_matmul_flops(dtype, size),
    )


def _product_bandwidth(dtype: jnp.dtype, width: int) -> float:
    weights = jnp.ones((PROBE_BYTES // (width * dtype.itemsize), width), dtype)
    vector = jnp.ones((1, len(weights)), dtype)
    return weights.nbytes / best_seconds(jax.jit(jnp.matmul), vector, weights)


def _sum_bandwidth(dtype: jnp.dtype) -> float:
    array = jnp.ones(PROBE_BYTES // dtype.itemsize, dtype)
    return array.nbytes / best_seconds(jax.jit(jnp.sum), array)


def _matmul_flops(dtype: jnp.dtype, size: int) -> float:
    matrix = jnp.full((size, size), 1 / size, dtype)
    return 2 * size**3 / best_seconds(jax.jit(jnp.matmul), matrix, matrix)


def best_seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Shortest of several calls, after one that compiles."""
    return min([timed(function, *arguments)[1] for _ in range(REPEATS + 1)][1:])


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """Call a function and wait for its arrays; return them and the seconds."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return result, time.perf_counter() - start
