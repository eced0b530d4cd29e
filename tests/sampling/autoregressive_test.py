"""Decoding with caches in groups: what a sample depends on; what the compiled loop copies."""

import dataclasses
import functools
import math
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dar_jax.models.dar import draws
from dar_jax.models.dar import options as options_lib
from dar_jax.models.dar.decoding import decoding_params
from dar_jax.models.dar.llama import Llama, LlamaConfig
from dar_jax.models.dar.options import DarSampling
from dar_jax.nn import decode_kernels
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.sampling import autoregressive, groups
from dar_jax.sampling.autoregressive import Conditioned, TokenDecoder
from dar_jax.sampling.logits import NO_TOKEN, SamplingConfig
from dar_jax.sampling.lookahead import decode_ahead
from tests.golden import models

FOLDERS = ("dar/gpt_tiny", "dar/gpt_gqa_tiny", "dar/gpt_t2i_tiny")
SAMPLING = SamplingConfig(temperature=0.9)
PREFIX_LENGTH = 5


def unstacked(folder):
    model, params = models.prior(folder)
    return model.unstacked(), decoding_params(params)


def conditions(config, batch_size):
    """Labels, or captions and their validity; the first ones are padded."""
    if config.caption_dim is None:
        return jnp.arange(batch_size) % config.num_classes, None
    shape = (batch_size, config.condition_tokens, config.caption_dim)
    padding = jnp.maximum(2 - jnp.arange(batch_size), 0)[:, None]
    valid = jnp.arange(config.condition_tokens) >= padding
    return jax.random.normal(jax.random.key(1), shape), valid


def generate(folder, rows, *, scale=1.0, interval=(), lookahead=0, **options):
    """Last yield of the prior's decoding for some rows of a batch of 16 conditions."""
    model, params = unstacked(folder)
    condition, valid = conditions(model.config, 16)
    rngs = jax.random.split(jax.random.key(0), 16)
    sampling = DarSampling(
        guidance_scale=scale, guidance_interval=interval, temperature=0.9, lookahead=lookahead
    )
    key_mask = None if valid is None else valid[rows]
    return list(
        draws.generate_indices(
            model,
            params,
            condition[rows],
            rngs[rows],
            sampling,
            key_mask=key_mask,
            **options,
        )
    )[-1]


@pytest.mark.parametrize("folder", FOLDERS)
def test_prefix_continues_as_if_it_had_been_drawn(folder):
    rows = slice(0, 3)
    tokens = generate(folder, rows, scale=2.0)
    prefix = tokens[:, :PREFIX_LENGTH]
    continued = generate(folder, rows, scale=2.0, prefix=prefix)
    np.testing.assert_array_equal(continued, tokens)
    other = generate(folder, rows, scale=2.0, prefix=prefix.at[:, 1].add(1) % 40)
    assert np.any(other[:, PREFIX_LENGTH:] != tokens[:, PREFIX_LENGTH:])


@pytest.mark.parametrize("folder", ["dar/gpt_tiny", "dar/gpt_t2i_tiny"])
def test_tokens_of_an_image_do_not_depend_on_the_batch(folder):
    small, large = (generate(folder, slice(0, size), scale=2.0) for size in (4, 16))
    np.testing.assert_array_equal(small, large[:4])
    assert len(np.unique(large, axis=0)) == 16


def test_groups_yield_the_tokens_so_far():
    folder = "dar/gpt_tiny"
    model, params = unstacked(folder)
    whole = generate(folder, slice(0, 2))
    condition, _ = conditions(model.config, 16)
    drawn = draws.generate_indices(
        model,
        params,
        condition[:2],
        jax.random.split(jax.random.key(0), 16)[:2],
        DarSampling(temperature=0.9),
        prefix=whole[:, :6],
        boundaries=(4, 7, 8, 16),
    )
    for tokens, length in zip(drawn, (4, 7, 8, 16), strict=True):
        np.testing.assert_array_equal(tokens, whole[:, :length])


@pytest.mark.parametrize(
    ("folder", "num_images", "options"),
    [
        ("dar/gpt_tiny", 3, {"lookahead": 5, "scale": 2.0, "boundaries": (4, 7, 8, 16)}),
        ("dar/gpt_gqa_tiny", 1, {"lookahead": 32, "scale": 2.0}),
        pytest.param("dar/gpt_gqa_tiny", 2, {"lookahead": 2}, marks=pytest.mark.slow),
        ("dar/gpt_t2i_tiny", 3, {"lookahead": 4, "scale": 2.0}),
        (
            "dar/gpt_tiny",
            2,
            {"lookahead": 4, "scale": 3.0, "interval": (0, 5), "boundaries": (4, 8, 16)},
        ),
    ],
)
def test_lookahead_draws_the_same_tokens(folder, num_images, options):
    rows = slice(0, num_images)
    tokens = generate(folder, rows, **{**options, "lookahead": 0})
    np.testing.assert_array_equal(generate(folder, rows, **options), tokens)
    prefix = tokens[:, :PREFIX_LENGTH]
    np.testing.assert_array_equal(generate(folder, rows, **options, prefix=prefix), tokens)


def test_lookahead_ends_where_logits_are_not_finite():
    model, params = unstacked("dar/gpt_tiny")
    params = {**params, "output": jax.tree.map(lambda x: x * np.nan, params["output"])}
    (tokens,) = draws.generate_indices(
        model,
        params,
        jnp.arange(2),
        jax.random.split(jax.random.key(0), 2),
        DarSampling(lookahead=4),
    )
    np.testing.assert_array_equal(tokens, NO_TOKEN)


@pytest.mark.parametrize(("lookahead", "images", "window"), [(0, 1, 0), (6, 64, 6), (-1, 64, 0)])
def test_window_is_what_is_asked_for_or_pays(lookahead, images, window, monkeypatch):
    sampling, auto = DarSampling(lookahead=lookahead), DarSampling(lookahead=-1)
    assert auto.window(1) == 0  # on a CPU
    monkeypatch.setattr(options_lib, "traced_devices", lambda: [mock.Mock(platform="gpu")])
    assert sampling.window(images) == window
    assert auto.window(1) > 1


def test_guidance_of_one_equals_no_guidance():
    model, params = unstacked("dar/gpt_tiny")
    config = model.config
    condition = jnp.arange(3)
    rngs = jax.random.split(jax.random.key(0), 3)
    scales = np.ones(config.num_tokens, np.float32)
    scales[-1] = 2.0  # keeps the unconditional rows to the end
    results = []
    for guided in (False, True):
        decoder = TokenDecoder(model, config.condition_tokens, SAMPLING, guided)
        rows = draws.embed_rows(model, params, condition, guided=guided)
        assert len(rows) == (6 if guided else 3)
        (tokens,) = groups.generate(
            Conditioned(decoder, params, rows, None),
            jnp.zeros((3, 0), jnp.int32),
            rngs,
            scales,
            boundaries=(config.num_tokens,),
        )
        results.append(tokens[:, :-1])
    np.testing.assert_array_equal(*results)


def test_tail_without_guidance_needs_no_unconditional_rows(monkeypatch):
    rows, interval = [], (0, 5)
    extend = Llama.extend

    def recording(self, x, *arguments):
        rows.append(len(x))
        return extend(self, x, *arguments)

    monkeypatch.setattr(groups, "SMALL_GROWTH", 0)
    monkeypatch.setattr(groups, "SMALL_SHARE", 0)
    whole = generate("dar/gpt_tiny", slice(0, 3), scale=3.0, interval=interval, boundaries=(16,))
    monkeypatch.setattr(Llama, "extend", recording)
    autoregressive.prefill.clear_cache()
    autoregressive.decode.clear_cache()
    boundaries = (4, 8, 12, 16)
    parts = generate(
        "dar/gpt_tiny", slice(0, 3), scale=3.0, interval=interval, boundaries=boundaries
    )
    assert rows == [6, 6, 6, 3, 3]
    np.testing.assert_array_equal(parts, whole)
    unguided = generate("dar/gpt_tiny", slice(0, 3))
    assert np.any(parts != unguided)


@pytest.mark.parametrize("lookahead", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_groups_share_a_program_where_caches_are_small(lookahead, monkeypatch):
    slots = []
    grow = autoregressive.grow

    def recording(caches, num_slots):
        slots.append(num_slots)
        return grow(caches, num_slots)

    options = dict(scale=2.0, lookahead=lookahead, boundaries=(4, 8, 16))
    whole = generate("dar/gpt_tiny", slice(0, 2), **options)
    beyond = max(lookahead - 1, 0)
    for share, groups_slots in ((10.0, [16, 16]), (0.0, [4, 4, 8, 16])):
        monkeypatch.setattr(groups, "SMALL_GROWTH", 0)
        monkeypatch.setattr(groups, "SMALL_SHARE", share)
        for program in (
            autoregressive.prefill,
            autoregressive.decode,
            decode_ahead,
        ):
            program.clear_cache()
        slots.clear()
        monkeypatch.setattr(autoregressive, "grow", recording)
        parts = generate("dar/gpt_tiny", slice(0, 2), **options)
        np.testing.assert_array_equal(parts, whole)
        assert slots == [each + beyond for each in groups_slots]


@pytest.mark.parametrize(
    ("spare", "expected"),
    [
        (31, [32, 64, 96, 128]),
        (32, [64, 64, 128, 128]),
        (64, [32, 128, 128, 128]),
        (96, [128, 128, 128, 128]),
    ],
)
def test_groups_share_slots_that_are_spare(spare, expected):
    assert groups.slots_of_groups([32, 64, 96, 128], spare) == expected


@pytest.mark.slow
@pytest.mark.parametrize(("lookahead", "guesses"), [(0, False), (3, False), (3, True)])
def test_kernels_draw_the_same_tokens_from_caches_that_do_not_grow(lookahead, guesses, monkeypatch):
    for name in ("extend_and_attend", "product"):
        interpreted = functools.partial(getattr(decode_kernels, name), interpret=True)
        monkeypatch.setattr(decode_kernels, name, interpreted)
    monkeypatch.setattr(groups, "SMALL_GROWTH", 0)
    monkeypatch.setattr(groups, "SMALL_SHARE", 0.0)
    config = LlamaConfig(
        num_layers=2, num_heads=4, dim=128, ffn_dim=128, vocab_size=32, num_tokens=8, num_classes=3
    )
    model = FunctionalModel(Llama, config).unstacked()
    kernels = dataclasses.replace(model, compute=Compute(stacked=False, decoding="pallas"))
    params = model.init(jax.random.key(0))
    noise = nnx.initializers.normal(0.3)  # logits start at zero
    params["output"]["kernel"] = noise(jax.random.key(1), params["output"]["kernel"].shape)
    sampling = DarSampling(guidance_scale=2.0, lookahead=lookahead)
    programs = decode_ahead if lookahead else autoregressive.decode
    drawn, counts = [], []
    for each in (model, kernels):
        programs.clear_cache()
        inputs = (jnp.arange(3), jax.random.split(jax.random.key(0), 3), sampling)
        how = dict(boundaries=(4, 8), draft=(each, params) if guesses else None)
        *_, tokens = draws.generate_indices(each, params, *inputs, **how)
        drawn.append(tokens)
        counts.append(programs._cache_size())
    np.testing.assert_array_equal(*drawn)
    assert counts == [2, 1]


def test_grow_pads_the_slots_with_zeros():
    caches = {"a": jnp.ones((1, 2, 3, 4)), "b": jnp.ones((1, 1, 3, 2))}
    grown = autoregressive.grow(caches, 5)
    assert grown["a"].shape == (1, 2, 5, 4)
    np.testing.assert_array_equal(grown["b"][0, 0, :, 0], [1, 1, 1, 0, 0])


def new_buffers_in_loops(text, size):
    """Instructions inside the while loops of a compiled module that write `size` elements anew.

    Updates in place, and what only passes a buffer on, are left out. So is the inside of a fusion:
    only its result is a buffer.
    """
    computations, lines = {}, []
    for line in text.splitlines():
        if start := re.match(r"(?:ENTRY )?%(\S+) \(.*{$", line):
            lines = computations[start[1]] = []
        elif instruction := re.match(r"\s+(ROOT )?%\S+ = (\S+) ([a-z-]+)\((.*)", line):
            lines.append((instruction[1], instruction[2], instruction[3], instruction[4]))

    def written(opcode, rest):
        if opcode != "fusion":
            return opcode
        (fused,) = re.findall(r"calls=%([^\s,]+)", rest)
        return next(op for root, _, op, _ in computations[fused] if root)

    bodies = set(re.findall(r"body=%([^\s,]+)", text))
    pending, found = list(bodies), []
    while pending:
        for _, shape, opcode, rest in computations[pending.pop()]:
            if opcode == "call":
                pending += re.findall(r"to_apply=%([^\s,]+)", rest)
            passes_on = ("parameter", "get-tuple-element", "bitcast", "dynamic-update-slice")
            elements = [int(n) for n in re.findall(r"\d+", shape.partition("[")[2].split("]")[0])]
            if written(opcode, rest) not in passes_on and math.prod(elements) >= size:
                found.append(f"{shape} {opcode}({rest[:80]}")
    assert bodies
    return found


@pytest.fixture
def optimized():
    """Compile as in production."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("num_kv_heads", [None, 2])
def test_decoding_copies_no_cache_and_no_weights(num_kv_heads):
    config = LlamaConfig(
        num_layers=2,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        dim=64,
        ffn_dim=192,
        vocab_size=64,
        num_tokens=64,
        num_classes=63,
    )
    model = FunctionalModel(Llama, config)
    params = jax.eval_shape(lambda: decoding_params(model.init(jax.random.key(0))))
    decoder = TokenDecoder(model.unstacked(), 1, SAMPLING, guided=True)

    def shapes():
        rngs = jax.random.split(jax.random.key(0), 2)
        caches = autoregressive.grow(model.unstacked().bind(params).empty_caches(4), 32)
        tokens = jnp.zeros((2, config.num_tokens), jnp.int32)
        return autoregressive.DecodingState(tokens, caches, None), rngs

    state, rngs = jax.eval_shape(shapes)
    scales = jax.ShapeDtypeStruct((config.num_tokens,), jnp.float32)
    span = dict(start=32, stop=config.num_tokens, num_slots=config.num_tokens + 4)
    lowered = autoregressive.decode.lower(decoder, params, state, rngs, scales, **span)
    matrices = [leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
    cache = state.caches[0].keys.size * 2  # of this group's slots
    assert not new_buffers_in_loops(lowered.compile().as_text(), min(*matrices, cache))


@pytest.mark.usefixtures("optimized")
def test_copies_of_a_cache_are_seen():
    """Layers scanned with caches as input and output copy all of them for every token."""

    def decode(caches):
        def token(caches, index):
            def layer(x, cache):
                cache = jax.lax.dynamic_update_slice_in_dim(cache, x[:, None], index, axis=1)
                return x + cache.sum(axis=1), cache

            x, caches = jax.lax.scan(layer, caches[0, :, 0], caches)
            return caches, x

        return jax.lax.scan(token, caches, jnp.arange(8))

    text = jax.jit(decode).lower(jnp.zeros((3, 4, 64, 16))).compile().as_text()
    assert new_buffers_in_loops(text, 4 * 64 * 16)
