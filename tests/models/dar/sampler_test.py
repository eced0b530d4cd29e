"""Decoding against the reference: solvers, previews, partial runs; steps and groups."""

import functools
import re

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.flow import solvers
from dar_jax.flow.times import shifted_grid
from dar_jax.models.dar import sampler
from dar_jax.models.dar.tokenizer import Tokenizer, TokenizerConfig, step_starts
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.pipelines.dar import TokenizerPipeline
from tests.golden import fixtures, models

FOLDERS = (
    "dar/tokenizer_tiny",
    pytest.param("dar/tokenizer_multihead", marks=pytest.mark.slow),
)
SOLVERS = {"adams2": "adams_bashforth2", "euler": "euler"}
ROUNDING = 1e-4  # the same sum in programs that XLA compiles differently; images reach 8


def to_nhwc(array):
    return jnp.asarray(einops.rearrange(array, "b c h w -> b h w c"))


def to_nchw(array):
    return einops.rearrange(array, "b h w c -> b c h w")


@functools.partial(jax.jit, static_argnames=("model", "solver"))
def decode(model, params, indices, noise, solver):
    return sampler.decode_indices(model, params, indices, noise, solver=solver)


@functools.partial(jax.jit, static_argnames="model")
def solver_inputs(model, params, indices, noise):
    """The state at every evaluation of a full run, in data units."""
    tokenizer, config = model.bind(params), model.config
    condition = tokenizer.condition_from_indices(indices)
    starts = step_starts(config, config.num_steps)
    windows = jnp.stack([condition[:, start : start + config.window] for start in starts])
    times = jnp.asarray(shifted_grid(config.num_steps, config.decoder.time_shift))
    table = solvers.coefficients("adams_bashforth2", config.num_steps)
    table = jax.tree.map(jnp.asarray, table)

    def body(state, inputs):
        time, next_time, window, coefficients = inputs
        new, _ = solvers.step(
            lambda x, t, window: tokenizer.velocity(x, t, window).velocity,
            state,
            time,
            next_time,
            window,
            coefficients,
        )
        return new, state.x

    return jax.lax.scan(body, solvers.start(noise), (times[:-1], times[1:], windows, table))[1]


def partial_run(name, start_image):
    """Options of `decode` that reproduce a partial run of the reference.

    Its `VQModel.decode_code` applies the offset twice when an image is given: when it cuts times
    and conditions, and in the sampler.
    """
    if match := re.fullmatch(r"decode_start(\d)_nox", name):
        return {"start_step": int(match[1])}
    if match := re.fullmatch(r"decode_start(\d)", name):
        return {"start_step": 2 * int(match[1]), "start_image": start_image}
    match = re.fullmatch(r"sample_start(\d)", name)
    return {"start_step": int(match[1]), "start_image": start_image}


@pytest.mark.parametrize("folder", FOLDERS)
def test_decode_equals_the_reference(folder):
    model, params = models.tokenizer(folder)
    config = model.config
    pipeline = TokenizerPipeline(model, params)
    with fixtures.Compare(folder, "io_decode") as golden:
        noise, image = to_nhwc(golden.arrays["noise"]), to_nhwc(golden.arrays["start_x"])
        indices = jnp.asarray(golden.arrays["codes"])
        for prefix, solver in SOLVERS.items():
            solution = decode(model, params, indices, noise, solver)
            golden.check(prefix, to_nchw(solution.x))
            for name in golden.spec:
                if match := re.fullmatch(rf"{prefix}_clip(\d)", name):
                    golden.check(name, to_nchw(solution.previews[int(match[1]) - 1]))
        times = shifted_grid(config.num_steps, config.decoder.time_shift)
        golden.check("adams2_t", times[:-1])
        if "adams2_x" in golden.spec:
            states = solver_inputs(model, params, indices, noise)
            golden.check("adams2_x", einops.rearrange(states[:, :1], "s b h w c -> s b c h w"))
        for name in golden.spec:
            if match := re.fullmatch(r"adams2_steps(\d)", name):
                options = {"num_steps": int(match[1])}
            elif "_start" in name:
                options = partial_run(name, image)
            else:
                continue
            golden.check(name, to_nchw(pipeline.decode(indices, noise=noise, **options)))
        recon = pipeline.decode(pipeline.encode(image), noise=noise)
        golden.check("recon", to_nchw(recon))


def test_preview_needs_the_tokens_of_its_groups_only():
    model, params = models.tokenizer("dar/tokenizer_multihead")
    pipeline = TokenizerPipeline(model, params)
    indices = jax.random.randint(jax.random.key(0), (2, 12), 0, 32)
    rng = jax.random.key(1)
    full = pipeline.decode(indices, rng=rng, num_groups=2)
    np.testing.assert_allclose(
        pipeline.decode(indices[:, :8], rng=rng, num_groups=2), full, atol=ROUNDING
    )


def test_run_from_the_last_time_returns_the_image():
    model, params = models.tokenizer("dar/tokenizer_multihead")
    image = jax.random.uniform(jax.random.key(0), (1, 32, 32, 3), minval=-1.0)
    decoded = TokenizerPipeline(model, params).decode(
        jnp.zeros((1, 12), int), rng=jax.random.key(1), start_step=6, start_image=image
    )
    np.testing.assert_allclose(decoded, image, rtol=1e-6)


@pytest.fixture(scope="module")
def multihead():
    """A pipeline and the inputs of its `decode` for four images."""
    pipeline = TokenizerPipeline(*models.tokenizer("dar/tokenizer_multihead"))
    indices = jax.random.randint(jax.random.key(0), (4, 12), 0, 32)
    noise = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    return pipeline, indices, noise


def test_inpainting_keeps_the_known_pixels_and_redraws_the_rest(multihead):
    pipeline, indices, noise = multihead
    decode = functools.partial(pipeline.decode, indices, noise=noise)
    free = decode()
    known = jax.random.uniform(jax.random.key(2), noise.shape, minval=-1.0)
    mask = np.zeros((4, 32, 32), bool)
    mask[:, :, :16] = True
    mask[3] = False
    for options in ({}, {"num_groups": 2}):
        images = decode(known=known, mask=mask, **options)
        np.testing.assert_array_equal(images[mask], known[mask])
    images = decode(known=known, mask=mask)
    # The flow sees the known pixels at every step, so the others follow them.
    assert np.all(np.abs(images - free)[:3, :, 16:].max(axis=(1, 2, 3)) > ROUNDING)
    np.testing.assert_allclose(images[3], free[3], atol=ROUNDING)
    pixelwise = decode(known=known, mask=mask[0].astype(np.int32))
    np.testing.assert_allclose(pixelwise[:3], images[:3], atol=ROUNDING)


def test_known_pixels_travel_from_their_noise(multihead):
    pipeline, _, noise = multihead
    known, std = jnp.full_like(noise, 0.5), pipeline.config.decoder.data_std
    mask = jnp.ones(noise.shape[:3], bool)
    constraint = sampler.constraint(sampler.Known(known, mask), noise, std)
    states = [constraint(noise * 7, jnp.full(4, t)) for t in (0.0, 0.25, 1.0)]
    np.testing.assert_array_equal(states[0], noise)
    np.testing.assert_allclose(states[1], 0.125 * std + 0.75 * noise, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(states[2], known * std)


@pytest.mark.parametrize("microbatch", [2, 4])
def test_microbatches_change_nothing(multihead, microbatch):
    pipeline, indices, noise = multihead
    parts = pipeline.decode(indices, noise=noise, microbatch=microbatch)
    np.testing.assert_allclose(parts, pipeline.decode(indices, noise=noise), atol=ROUNDING)


def test_microbatch_bounds_what_the_decoder_sees(multihead, monkeypatch):
    pipeline, indices, noise = multihead
    sizes, velocity = [], Tokenizer.velocity

    def recording(self, x_t, *arguments):
        sizes.append(len(x_t))
        return velocity(self, x_t, *arguments)

    monkeypatch.setattr(Tokenizer, "velocity", recording)
    decode = functools.partial(sampler.decode_indices, pipeline.model, microbatch=2)
    jax.eval_shape(decode, pipeline.params, indices, noise)
    assert set(sizes) == {2}


def test_bfloat16_keeps_the_state_in_float32(multihead):
    pipeline, indices, noise = multihead
    exact = pipeline.decode(indices, noise=noise)
    model = FunctionalModel(Tokenizer, pipeline.config, Compute(dtype="bfloat16"))
    coarse = TokenizerPipeline(model, pipeline.params)
    images = coarse.decode(indices, noise=noise)
    assert images.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(images - exact) / np.linalg.norm(exact) < 0.05
    # A bfloat16 state would leave 8 bits of every value.
    assert np.any(images != images.astype(jnp.bfloat16).astype(jnp.float32))
    matrices = coarse.sampling_params["decoder"]["patch_embed"]["kernel"]
    assert matrices.dtype == jnp.bfloat16
    coarse.sampling_params = coarse.params  # cast at every step instead of once
    np.testing.assert_array_equal(images, coarse.decode(indices, noise=noise))


def test_noise_of_an_image_depends_on_its_key_only():
    rngs = jax.random.split(jax.random.key(0), 5)
    noise = sampler.initial_noise(rngs, (8, 4))
    assert noise.shape == (5, 8, 4, 3)
    np.testing.assert_array_equal(noise[3:], sampler.initial_noise(rngs[3:], (8, 4)))
    assert len(np.unique(noise)) == noise.size


def test_steps_of_groups_counts_complete_windows():
    config = TokenizerConfig(num_tokens=12, num_groups=3, num_steps=6)
    assert [sampler.steps_of_groups(config, 6, groups) for groups in (1, 2, 3)] == [1, 3, 6]
    overlapping = TokenizerConfig(num_tokens=12, num_groups=3, tokens_per_step=6)
    assert [sampler.steps_of_groups(overlapping, 5, groups) for groups in (2, 3)] == [1, 5]


@pytest.mark.parametrize("num_groups", [0, 4])
def test_steps_of_groups_refuses_other_numbers(num_groups):
    config = TokenizerConfig(num_tokens=12, num_groups=3)
    with pytest.raises(ValueError, match=rf"num_groups={num_groups} must be in 1..3"):
        sampler.steps_of_groups(config, 6, num_groups)


def test_steps_of_groups_refuses_an_incomplete_window():
    config = TokenizerConfig(num_tokens=12, num_groups=3, tokens_per_step=6)
    with pytest.raises(ValueError, match="num_groups=1 .* 4 tokens.* 6"):
        sampler.steps_of_groups(config, 6, 1)
