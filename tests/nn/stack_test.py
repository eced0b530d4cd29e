"""Scanned and rematerialised stacks equal the plain loop, in values and gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dar_jax.common.flops import traced_flops
from dar_jax.nn.compute import REMAT_POLICIES, Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.nn.layers import Mlp, dropout
from dar_jax.nn.stack import Stack, unstack

DIM, DEPTH = 4, 3
RTOL = 1e-5  # XLA fuses a scan and a loop differently


class Block(nnx.Module):
    def __init__(self, *, compute, rngs):
        self.mlp = Mlp(DIM, 2 * DIM, compute=compute, rngs=rngs)
        self.gate = nnx.Param(jax.random.normal(rngs.params(), (DIM,)))

    def __call__(self, x, shift, *, scale=1.0, rng=None):
        return dropout(x + self.gate * scale * self.mlp(jnp.sin(20 * x) + shift), 0.5, rng)


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    depth: int = DEPTH


class Tower(nnx.Module):
    def __init__(self, config, *, rngs, compute):
        self.stack = Stack(
            lambda block_rngs: Block(compute=compute, rngs=block_rngs),
            config.depth,
            compute=compute,
            rngs=rngs,
        )


MODEL = FunctionalModel(Tower, TowerConfig())
X = jax.random.normal(jax.random.key(0), (2, DIM))
SHIFT = jax.random.normal(jax.random.key(1), (DIM,))


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(2))


@functools.partial(jax.jit, static_argnames=("model", "start", "stop"))
def run(model, params, x, rng=None, start=0, stop=None):
    stack = model.bind(params).stack
    return stack(x, SHIFT, scale=3.0, rng=rng, start=start, stop=stop)


@functools.partial(jax.jit, static_argnames="model")
def gradient(model, params, x):
    return jax.grad(lambda p, x: jnp.sum(jnp.sin(run(model, p, x))), argnums=(0, 1))(params, x)


def assert_close(a, b):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=RTOL, atol=RTOL), a, b)


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_scan_equals_the_loop(params, remat):
    scanned = dataclasses.replace(MODEL, compute=Compute(remat=remat))
    loop, loop_params = MODEL.unstacked(), unstack(params)
    assert_close(run(scanned, params, X), run(loop, loop_params, X))
    in_params, in_x = gradient(scanned, params, X)
    loop_in_params, loop_in_x = gradient(loop, loop_params, X)
    assert_close(in_x, loop_in_x)
    assert_close(unstack(in_params), loop_in_params)


def test_products_are_computed_twice_where_blocks_are(params):
    def work(remat):
        model = dataclasses.replace(MODEL, compute=Compute(remat=remat))
        return traced_flops(jax.make_jaxpr(functools.partial(gradient, model))(params, X).jaxpr)

    assert work("none") == work("dots") < work("blocks")


def test_unrolled_blocks_are_computed_twice_as_well(params):
    """Without a loop the compiler would find that both are the same, and keep everything."""

    def sines(remat):
        model = dataclasses.replace(MODEL, compute=Compute(remat=remat, unroll=True))
        return gradient.lower(model, params, X).compile().as_text().count(" sine(")

    assert sines("none") < sines("blocks")


@pytest.mark.parametrize("model", [MODEL, MODEL.unstacked()], ids=["scanned", "loop"])
def test_two_parts_equal_the_whole(params, model):
    weights = params if model.compute.stacked else unstack(params)
    half = run(model, weights, X, stop=1)
    assert np.any(half != X)
    assert_close(run(model, weights, half, start=1), run(model, weights, X))
    np.testing.assert_array_equal(run(model, weights, X, start=DEPTH), X)


def test_randomness_is_equal_in_scan_and_loop(params):
    rng = jax.random.key(3)
    scanned = run(MODEL, params, X, rng)
    assert_close(scanned, run(MODEL.unstacked(), unstack(params), X, rng))
    assert np.any(scanned != run(MODEL, params, X, jax.random.key(4)))


def test_parts_draw_what_the_whole_draws(params):
    rng = jax.random.key(3)
    parts = run(MODEL, params, run(MODEL, params, X, rng, stop=2), rng, start=2)
    assert_close(parts, run(MODEL, params, X, rng))


def test_blocks_start_differently(params):
    kernels = params["stack"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernels.shape == (DEPTH, DIM, 2 * DIM)
    assert np.all(kernels[0] != kernels[1])


def test_empty_stack_is_the_identity():
    empty = FunctionalModel(Tower, TowerConfig(depth=0))
    params = empty.init(jax.random.key(0))
    assert jax.tree.leaves(params) == []
    np.testing.assert_array_equal(run(empty, params, X), X)


@pytest.mark.parametrize(
    ("options", "message"),
    [(dict(dtype="float16"), "dtype 'float16'"), (dict(remat="all"), "remat 'all'")],
)
def test_compute_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Compute(**options)
