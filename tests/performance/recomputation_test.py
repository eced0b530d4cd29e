"""`compute.remat=auto` takes the least recomputation that fits."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dar_jax.nn.compute import Compute
from dar_jax.performance import recomputation
from dar_jax.performance.programs import Program
from dar_jax.performance.recomputation import choose_remat

DOTS = 15e9
"""Bytes of a step that keeps its products."""
AUTO = Compute(dtype="bfloat16", remat="auto")


@pytest.fixture
def compiled(monkeypatch):
    """Policies whose step was compiled."""
    monkeypatch.setattr(recomputation, "memory_of", lambda _: {"total": DOTS})
    return []


def step_of(compiled):
    def train_step(compute):
        compiled.append(compute.remat)
        return Program("train step", jax.jit(jnp.sin), (jax.ShapeDtypeStruct((), "f4"),), {}, 1)

    return train_step


@pytest.mark.parametrize(
    ("memory", "taken", "tried"),
    [
        (None, "dots", []),
        (20e9, "dots", ["dots"]),
        (16e9, "blocks", ["dots"]),  # little is left for pictures
        (1e9, "blocks", ["dots"]),
    ],
)
def test_least_recomputation_that_fits_is_taken(compiled, memory, taken, tried):
    compute = choose_remat(AUTO, step_of(compiled), memory, "tpu")
    assert compute == Compute(dtype="bfloat16", remat=taken)
    assert compiled == tried


def test_unrolled_blocks_may_keep_everything(compiled):
    unrolled = dataclasses.replace(AUTO, unroll=True)
    assert choose_remat(unrolled, step_of(compiled), 20e9, "tpu").remat == "none"
    assert choose_remat(unrolled, step_of(compiled), 1e9, "tpu").remat == "blocks"
    assert compiled == ["none", "none", "dots"]


@pytest.mark.parametrize("platform", ["gpu", "cuda"])
def test_gpus_unroll_blocks_where_nothing_is_recomputed(compiled, platform):
    for memory, taken in ((20e9, "none"), (None, "none"), (1e9, "blocks")):
        compute = choose_remat(AUTO, step_of(compiled), memory, platform)
        assert compute == Compute(dtype="bfloat16", remat=taken, unroll=taken == "none")


def test_step_that_cannot_be_compiled_does_not_fit(compiled, monkeypatch):
    def exhausted(_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(recomputation, "memory_of", exhausted)
    assert choose_remat(AUTO, step_of(compiled), 1e12, "tpu").remat == "blocks"


def test_what_is_decided_stays(compiled):
    compute = Compute(remat="blocks")
    assert choose_remat(compute, step_of(compiled), 1e12, "gpu") is compute
    assert not compiled
