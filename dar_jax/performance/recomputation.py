"""`compute.remat=auto`: the least recomputation with which a train step fits into memory.

The step is compiled with each policy in turn, the fastest first, until the compiler's own count of
its memory fits: exact, for the time of a compilation more.

To recompute nothing is among them where blocks are unrolled only. A loop writes what stands between
products in every layer, to be read again, which takes longer than to compute it: a step of D-AR-L
with 128 images moves 576 GB and needs 80 on an H200, 399 and 28 where only products are kept.
Unrolled, it is 294 and 39, and a sixth of the time less: GPUs try that first. It compiles several
times as long, once.
"""

import dataclasses
from collections.abc import Callable

import jax
from absl import logging

from dar_jax.nn.compute import Compute
from dar_jax.performance.programs import Program, memory_of

POLICIES = ("dots", "blocks")
"""Of `compute.remat`, the fastest first; before them `none`, where blocks are unrolled."""
UNROLLING = ("gpu", "cuda")
"""Platforms that unroll blocks for it."""
USABLE = 0.9
"""Share of the memory that a step may take: pictures, evaluation and fragments have the rest."""


def choose_remat(
    compute: Compute,
    train_step: Callable[[Compute], Program],
    memory: float | int | None,
    platform: str,
) -> Compute:
    """Return `compute` with `remat=auto` decided; what is decided already stays.

    Args:
        compute: execution choices.
        train_step: the train step of others.
        memory: bytes of a device; None, where it is not known, takes the fastest.
        platform: of the devices.
    """
    if compute.remat != "auto":
        return compute
    candidates = [dataclasses.replace(compute, remat=policy) for policy in POLICIES]
    if compute.unroll or platform in UNROLLING:
        candidates.insert(0, dataclasses.replace(compute, remat="none", unroll=True))
    if memory is None:
        return candidates[0]
    for candidate in candidates[:-1]:
        name = candidate.remat + (", unrolled," if candidate.unroll else "")
        logging.info("Compiling a step to see whether compute.remat=%s fits", name)
        needed = _needed(train_step(candidate))
        fits = needed <= USABLE * memory
        logging.info(
            "compute.remat=%s needs %.3g GB of %.3g: %s",
            name,
            needed / 1e9,
            memory / 1e9,
            "taken" if fits else "too much",
        )
        if fits:
            return candidate
    logging.info("compute.remat=%s is what is left", candidates[-1].remat)
    return candidates[-1]


def _needed(program: Program) -> float:
    """Bytes of one device."""
    lowered = program.function.lower(*program.arguments, **program.options)
    try:
        return memory_of(lowered.compile())["total"]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return float("inf")
