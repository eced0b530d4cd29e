"""The flow decoder against the reference: submodules, velocity, solvers, training loss."""

import functools

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dar_jax.flow import path, solvers
from dar_jax.flow.times import shift_times, shifted_grid
from dar_jax.models.dar.decoder import FlowDecoderConfig
from dar_jax.nn.adaln import modulate
from dar_jax.nn.compute import Compute
from dar_jax.nn.layers import layer_norm
from dar_jax.nn.patch import patchify
from dar_jax.nn.rope import rope_2d
from dar_jax.nn.stack import unstack
from tests.golden import fixtures, models

STAND_ALONE = ("dar/diff_decoder_multihead", "dar/diff_decoder_shared_time")
TRACED_TOKENS = 8
TRACED_STRIDE = 3
FEATURE_STRIDE = 32
SMALL = 0.002
IRREGULAR_TIMES = (0.0, 0.1, 0.65, 1.0)
ROUNDING = 2e-6
"""Of values near 2: the solution and its last preview are the same sum, compiled twice."""


def to_nhwc(array):
    return jnp.asarray(einops.rearrange(array, "... c h w -> ... h w c"))


def to_nchw(array):
    return einops.rearrange(array, "... h w c -> ... c h w")


@functools.partial(jax.jit, static_argnames="model")
def predict(model, params, x_t, t, condition):
    return model.bind(params)(x_t, t, condition, with_features=True)


@functools.partial(jax.jit, static_argnames="model")
def trace_blocks(model, params, x_t, t, condition):
    """Submodules of the unstacked decoder, in the order of its forward pass."""
    decoder, config = model.bind(params), model.config
    projected = decoder.condition_projection(condition)
    context = layer_norm(projected)
    rope = rope_2d(*grid_of(x_t, config), config.head_dim, config.rope_base)
    x = decoder.patch_embed(patchify(x_t, config.patch_size))
    values = {"cond_proj": projected, "conv_in": x[:1, ::TRACED_STRIDE]}

    block, time = decoder.stack.blocks[0], decoder.embed_time(t)
    embedded, attended = block.embed_time(time), block.attend_condition(x, context, rope)
    modulation = block.modulation(jax.nn.silu(embedded[:, None] + attended))
    shift, scale = jnp.split(modulation, 6, axis=-1)[:2]
    self_attended = block.attention(
        modulate(layer_norm(x), shift, scale), query_rope=rope, key_rope=rope
    )
    values |= {
        "b0_time_embed": embedded,
        "b0_cross": attended[:1, :TRACED_TOKENS],
        "b0_adaln": modulation[:1, :TRACED_TOKENS],
        "b0_self_attn": self_attended[:1, :TRACED_TOKENS],
    }
    for i, block in enumerate(decoder.stack.blocks):
        x = block(x, time, context, rope)
        values[f"block{i}"] = x[:1, ::TRACED_STRIDE]
    return values


@functools.partial(jax.jit, static_argnames=("model", "solver"))
def integrate(model, params, x, times, conditions, solver):
    decoder = model.bind(params)

    def velocity(x, t, condition):
        return decoder(x, t, condition).velocity

    solution = solvers.integrate(velocity, x, times, conditions, solver=solver)
    return jax.tree.map(lambda leaf: leaf / model.config.data_std, solution)


def grid_of(x_t, config):
    return tuple(side // config.patch_size for side in x_t.shape[1:3])


def check_network(golden, model, params, condition):
    """Everything that one evaluation of the network gives."""
    x_t, t = to_nhwc(golden.arrays["x_t"]), golden.arrays["t"]
    golden.check_all(**trace_blocks(model.unstacked(), unstack(params), x_t, t, condition))
    prediction = predict(model, params, x_t, t, condition)
    golden.check("velocity", to_nchw(prediction.velocity))
    small = predict(model, params, SMALL * x_t, t, SMALL * condition).velocity
    golden.check("velocity_small", to_nchw(small[:1]))
    if model.config.gives_features:
        golden.check("h_repa_sub", prediction.features[:, ::FEATURE_STRIDE])
    else:
        assert prediction.features is None


def check_sampling(golden, model, params):
    """Solvers over three steps, previews and partial runs."""
    conditions, noise = golden.arrays["conds"], to_nhwc(golden.arrays["noise"])
    times = shifted_grid(len(conditions), model.config.time_shift)
    run = functools.partial(integrate, model, params)
    for name, solver in {"adams2": "adams_bashforth2", "euler": "euler"}.items():
        solution = run(noise, times, conditions, solver)
        golden.check(name, to_nchw(solution.x))
        np.testing.assert_allclose(solution.previews[-1], solution.x, rtol=0, atol=ROUNDING)
        if name == "adams2":
            golden.check("adams2_clip2", to_nchw(solution.previews[1]))
    data = to_nhwc(golden.arrays["image"]) * model.config.data_std
    start = path.interpolate(data, noise, jnp.full(len(data), times[1]))
    solution = run(start, times[1:], conditions[1:], "euler")
    golden.check("euler_start1", to_nchw(solution.x))
    irregular = shift_times(np.float32(IRREGULAR_TIMES), model.config.time_shift)
    solution = run(noise, irregular, conditions, "adams_bashforth2")
    golden.check("irregular", to_nchw(solution.x))


def check_training(golden, model, params):
    """The flow-matching loss with given draws."""
    std = model.config.data_std
    data, noise = to_nhwc(golden.arrays["image"]) * std, to_nhwc(golden.arrays["noise"])
    t = shift_times(jnp.asarray(golden.arrays["t"]), model.config.time_shift)
    x_t = path.interpolate(data, noise, t)
    velocity = predict(model, params, x_t, t, golden.arrays["conds"][0]).velocity
    error = (velocity - path.velocity(data, noise)) / std
    golden.check_all(
        shifted_time=t,
        noisy_input=to_nchw(x_t / std),
        predict_x1=to_nchw(path.predict_data(x_t, velocity, t) / std),
        fm_loss=jnp.mean(error**2),
    )


def test_network_of_the_tokenizer_equals_the_reference():
    model, params = models.flow_decoder("dar/tokenizer_tiny")
    with fixtures.Compare("dar/tokenizer_tiny", "io_velocity") as golden:
        check_network(golden, model, params, golden.arrays["cond"])


@pytest.mark.parametrize("folder", STAND_ALONE)
def test_stand_alone_decoder_equals_the_reference(folder):
    model, params = models.flow_decoder(folder)
    with fixtures.Compare(folder) as golden:
        check_network(golden, model, params, golden.arrays["conds"][0])
        check_sampling(golden, model, params)
        check_training(golden, model, params)


@pytest.mark.parametrize("modulated_head", [False, True])
def test_fresh_decoder_predicts_zero(modulated_head):
    config = FlowDecoderConfig(
        dim=64, depth=1, feature_layer=None, shared_time=True, modulated_head=modulated_head
    )
    decoder = models.with_condition_dim(5)(config, compute=Compute(), rngs=nnx.Rngs(0))
    inputs = jnp.ones((1, 8, 8, 3)), jnp.zeros(1), jnp.ones((1, 4, 5))
    np.testing.assert_array_equal(decoder(*inputs).velocity, 0.0)


def test_alignment_features_of_a_small_grid_are_refused():
    model, params = models.flow_decoder("dar/diff_decoder_shared_time")
    inputs = jnp.ones((1, 15, 16, 3)), jnp.zeros(1), jnp.ones((1, 3, 64))
    with pytest.raises(ValueError, match="at least 16 rows of patches, got 15"):
        predict(model, params, *inputs)
    assert jax.eval_shape(model.bind(params), *inputs).velocity.shape == (1, 15, 16, 3)


def test_modulated_head_needs_shared_time():
    with pytest.raises(ValueError, match="modulated_head=True needs shared_time=True"):
        FlowDecoderConfig(modulated_head=True)
