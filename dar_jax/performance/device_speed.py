"""What one device does at best: memory bandwidth and matrix FLOP/s, measured where it runs.

Both are the best of several repeats of programs that do nothing else. A model cannot pass them
unless it fits in a cache. Accelerators read gigabytes in a call, and several calls are under way at
a time: starting one takes as long as reading hundreds of megabytes. Of those in `parallel.chips` it
is known what they should reach, and a probe that falls short says so.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dar_jax.parallel.chips import Chip

GIGA = 1e9
PROBE_BYTES = 2**29
"""Of CPUs: far more than any cache holds."""
LARGE_PROBE_BYTES = 2**33
"""Of accelerators: a millisecond of the fastest memory."""
PROBE_SHARE = 1 / 16
"""Of the memory that a probe takes at most; results of all calls under way are held too."""
CALLS = {"cpu": 1}
LARGE_CALLS = 8
"""Of accelerators: calls under way at a time."""
DATA_SHEET_SHARE = 0.85
"""Of the bandwidth of the data sheet that a good probe reaches; an H200 90 %."""
MATMUL_SIZES = {"cpu": 2048}
LARGE_MATMUL_SIZE = 8192
"""Accelerators need this much to hide the launch."""
REPEATS = 10


@dataclasses.dataclass(frozen=True)
class DeviceSpeed:
    """Measured speed of one device.

    Attributes:
        bandwidth: bytes/s that the memory moves: the best of a sum, which reads, a matrix-vector
            product, as in decoding, and a copy.
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
    num_bytes = probe_bytes(jax.default_backend(), memory_bytes())
    product = _product_bandwidth(dtype, size, num_bytes)
    return DeviceSpeed(
        # On CPU one product alone does not saturate the memory.
        bandwidth=max(product, _sum_bandwidth(dtype, num_bytes), _copy_bandwidth(dtype, num_bytes)),
        product_bandwidth=product,
        flops=_matmul_flops(dtype, size),
    )


def probe_bytes(platform: str, memory: int) -> int:
    """Bytes that a probe reads in one call."""
    if platform == "cpu":
        return PROBE_BYTES
    return min(LARGE_PROBE_BYTES, int(memory * PROBE_SHARE))


def memory_bytes() -> int:
    """Memory of the first device of this process; that of the machine where it does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def shortfall(bandwidth: float, chip: Chip | None) -> str:
    """What to say of a bandwidth that is too low for the chip; empty if it is not, or unknown."""
    if chip is None or bandwidth >= DATA_SHEET_SHARE * chip.hbm_bandwidth:
        return ""
    return (
        f"the probe moved {bandwidth / GIGA:.4g} GB/s, {bandwidth / chip.hbm_bandwidth:.0%} of the "
        f"{chip.hbm_bandwidth / GIGA:.4g} of the data sheet: bounds by memory are too kind"
    )


def _product_bandwidth(dtype: jnp.dtype, width: int, num_bytes: int) -> float:
    weights = jnp.ones((num_bytes // (width * dtype.itemsize), width), dtype)
    vector = jnp.ones((1, len(weights)), dtype)
    return weights.nbytes / best_seconds(jax.jit(jnp.matmul), vector, weights)


def _sum_bandwidth(dtype: jnp.dtype, num_bytes: int) -> float:
    array = jnp.ones(num_bytes // dtype.itemsize, dtype)
    return array.nbytes / best_seconds(jax.jit(jnp.sum), array)


def _copy_bandwidth(dtype: jnp.dtype, num_bytes: int) -> float:
    array = jnp.ones(num_bytes // dtype.itemsize, dtype)
    return 2 * array.nbytes / best_seconds(jax.jit(jnp.negative), array)


def _matmul_flops(dtype: jnp.dtype, size: int) -> float:
    matrix = jnp.full((size, size), 1 / size, dtype)
    return 2 * size**3 / best_seconds(jax.jit(jnp.matmul), matrix, matrix)


def best_seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Shortest time of a call, of several that are under way together; the first one compiles."""
    count = CALLS.get(jax.default_backend(), LARGE_CALLS)
    timed(function, *arguments)

    def together() -> list[Any]:
        return [function(*arguments) for _ in range(count)]

    return min(timed(together)[1] for _ in range(REPEATS)) / count


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """Call a function and wait for its arrays; return them and the seconds."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return result, time.perf_counter() - start
