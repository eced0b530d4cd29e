"""What a compiled program starts on a GPU, and how long that takes by a model of it.

    a kernel takes the longest of START, its bytes and the FLOPs of its products

at shares of the data sheet that one H200 reached in traces: 1.3 us, 4.3 of 4.8 TB/s and 790 of 989
TFLOP/s. Attention kernels count by their bytes. Collectives are left out.
"""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from dar_jax.parallel.chips import Chip
from dar_jax.performance.hlo import HloProgram, Instruction, type_shape

START = 1.3e-6
"""Seconds of the shortest kernel."""
BANDWIDTH_SHARE, FLOPS_SHARE = 0.9, 0.8
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


class Kernels(NamedTuple):
    """Kernels of one run on one device.

    Attributes:
        count: of all.
        libraries: of those that are no code of the compiler's own, by name.
        seconds: by the model.
    """

    count: int
    libraries: dict[str, int]
    seconds: float


def kernels_of(program: HloProgram, chip: Chip) -> Kernels:
    """Count the kernels of a program for such chips."""
    count, seconds = 0, 0.0
    libraries = collections.Counter()
    for kernel in program.kernels():
        count += kernel.runs
        flops = sum(_product_flops(kernel.inside))
        seconds += kernel.runs * max(
            START,
            kernel.bytes / (BANDWIDTH_SHARE * chip.hbm_bandwidth),
            flops / (FLOPS_SHARE * chip.peak_flops),
        )
        if target := _TARGET.search(kernel.instruction.attributes):
            libraries[target[1]] += kernel.runs
    return Kernels(count, dict(libraries), seconds)


def _product_flops(instructions: dict[str, Instruction]) -> Iterator[float]:
    for product in instructions.values():
        if product.opcode == "dot" and (axes := _CONTRACTED.search(product.attributes)):
            left = type_shape(instructions[product.operands[0]].type)
            contracted = math.prod(left[int(axis)] for axis in axes[1].split(",") if axis)
            yield 2 * contracted * math.prod(type_shape(product.type))
