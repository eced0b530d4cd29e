"""Modules as pure functions: parameters outside, models as static arguments."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.nn.layers import Mlp


@dataclasses.dataclass(frozen=True)
class NetConfig:
    dim: int = 4


class Net(nnx.Module):
    def __init__(self, config, *, rngs, compute):
        self.mlp = Mlp(config.dim, 8, compute=compute, rngs=rngs)

    def __call__(self, x):
        return self.mlp(x)


class OtherNet(Net):
    pass


def test_equal_models_are_one_static_argument():
    traces = []

    def apply(model, params, x):
        traces.append(model)
        return model.bind(params)(x)

    compiled = jax.jit(apply, static_argnums=0)
    x = jnp.ones((2, 4))
    for _ in range(2):
        model = FunctionalModel(Net, NetConfig())
        compiled(model, model.init(jax.random.key(0)), x)
    assert len(traces) == 1


@pytest.mark.parametrize(
    "other",
    [
        FunctionalModel(Net, NetConfig(dim=5)),
        FunctionalModel(OtherNet, NetConfig()),
        FunctionalModel(Net, NetConfig(), Compute(dtype="bfloat16")),
        FunctionalModel(Net, NetConfig()).unstacked(),
    ],
)
def test_other_models_are_unequal(other):
    model = FunctionalModel(Net, NetConfig())
    assert model == FunctionalModel(Net, NetConfig())
    assert hash(model) == hash(FunctionalModel(Net, NetConfig()))
    assert model != other
    assert len({model, other}) == 2


def test_init_gives_plain_nested_float32_and_depends_on_the_key():
    model = FunctionalModel(Net, NetConfig(), Compute(dtype="bfloat16"))
    params = model.init(jax.random.key(0))
    assert set(params["mlp"]) == {"up", "down"}
    assert type(params["mlp"]["up"]) is dict
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    same, other = model.init(jax.random.key(0)), model.init(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, params, same)
    assert np.all(params["mlp"]["up"]["kernel"] != other["mlp"]["up"]["kernel"])
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    assert model.abstract_params() == shapes


def test_bind_does_not_hold_on_to_parameters():
    model = FunctionalModel(Net, NetConfig())
    params = model.init(jax.random.key(0))
    x = jnp.ones((2, 4))
    before = model.bind(params)(x)
    zero = jax.tree.map(jnp.zeros_like, params)
    np.testing.assert_array_equal(model.bind(zero)(x), 0.0)
    np.testing.assert_array_equal(model.bind(params)(x), before)


def test_compute_dtype_is_that_of_the_activations():
    model = FunctionalModel(Net, NetConfig(), Compute(dtype="bfloat16"))
    params = model.init(jax.random.key(0))
    assert model.bind(params)(jnp.ones((2, 4))).dtype == jnp.bfloat16
