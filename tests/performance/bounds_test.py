"""Bounds of sampling against the published ones."""

import dataclasses

import pytest

from dar_jax.common.tree import num_parameters
from dar_jax.models.dar.llama import SIZES, LlamaConfig
from dar_jax.models.dar.tokenizer import TokenizerConfig
from dar_jax.models.kl_vae import KlVaeConfig
from dar_jax.models.transdiff import model as transdiff
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.performance.bounds import DarBounds, TransDiffBounds
from dar_jax.performance.device_speed import DeviceSpeed

H200 = DeviceSpeed(bandwidth=4.3e12, product_bandwidth=4.3e12, flops=790e12)
SMALL_TRAFFIC = 0.04  # the published bounds also count written caches and logits


def bounds(size):
    return DarBounds(LlamaConfig(**SIZES[size]), TokenizerConfig(), 2, H200)


@pytest.mark.parametrize(
    ("size", "batch_size", "images_per_second"),
    [
        ("l", 1, 22.8),
        ("l", 8, 100),
        ("l", 64, 172),
        ("l", 256, 187),
        ("xl", 1, 10.4),
        ("xl", 8, 55.6),
        ("xl", 64, 122),
        ("xl", 256, 140),
    ],
)
def test_end_to_end_is_the_published_bound(size, batch_size, images_per_second):
    found = batch_size / bounds(size).end_to_end(batch_size, guided=True)
    assert images_per_second <= found * 1.01
    assert found == pytest.approx(images_per_second, rel=SMALL_TRAFFIC)


def test_tokens_are_bound_by_the_slower_of_memory_and_matrix_units():
    fast = dataclasses.replace(bounds("l"), speed=dataclasses.replace(H200, flops=1e18))
    assert fast.tokens(1, guided=True) == bounds("l").tokens(1, guided=True)
    slow = dataclasses.replace(bounds("l"), speed=dataclasses.replace(H200, flops=1e12))
    assert slow.tokens(8, guided=True) == pytest.approx(8 * 0.3393, rel=1e-3)  # 339.3 GFLOP each


def test_first_preview_is_the_first_group_and_one_step():
    bound = bounds("xl")
    assert 8 * bound.first_preview(1, guided=False) < bound.end_to_end(1, guided=False)
    assert bound.first_preview(1, guided=False) > bound.tokens(1, False, num_groups=1)
    wide = dataclasses.replace(bound.tokenizer, tokens_per_step=64)
    wide = dataclasses.replace(bound, tokenizer=wide)
    assert wide.first_group == 2
    assert wide.first_preview(1, guided=False) > bound.tokens(1, False, num_groups=2)


def transdiff_bounds(size, speed=H200, num_steps=100, **form):
    config = transdiff.TransDiffConfig(**transdiff.SIZES[size], **form)
    return TransDiffBounds(config, KlVaeConfig(), num_steps, 2, speed)


@pytest.mark.parametrize(("size", "teraflops"), [("b", 12.8), ("l", 29.7), ("h", 57.4)])
def test_latents_are_bound_by_the_published_work(size, teraflops):
    """Published without cached keys and values of the condition, which save 11 %."""
    phases = transdiff_bounds(size).phases(64, 1.3)
    seconds = phases["encoder"] + phases["denoising"]
    assert seconds == pytest.approx(64 * 0.89 * teraflops * 1e12 / H200.flops, rel=0.01)


def test_phases_of_transdiff_add_up():
    for form, previews in (({}, 4), (transdiff.MRAR, 4), (dict(latent_size=32), 4)):
        bounds = transdiff_bounds("l", **form)
        phases, decode = bounds.phases(8, 1.5), bounds.phases(8, None)["decode"]
        latents = phases["encoder"] + phases["denoising"]
        assert phases["end to end"] == pytest.approx(latents + decode)
        assert phases["streaming"] == pytest.approx(latents + previews * decode)
        # A quarter of the steps, all with the whole condition, or a quarter with a part of it.
        first = bounds.encoder(8, True, 0) + 25 * bounds.step(8, True, 0) + decode
        if bounds.model.num_references > 1:
            first += 75 * bounds.step(8, True, 0)
        assert phases["first preview"] == pytest.approx(first)
        assert phases["denoising"] == pytest.approx(2 * bounds.phases(8, 1.0)["denoising"])


def test_step_reads_the_decoder_and_the_condition():
    slow_memory = dataclasses.replace(H200, bandwidth=1e9)
    bounds = transdiff_bounds("b", slow_memory)
    params = FunctionalModel(transdiff.TransDiff, bounds.model).abstract_params()
    # Not read in a step: keys and values, their projection; tables and biases, below 2 %.
    weights = num_parameters(params["decoder"]) - (1 + 2 * 12) * 768**2
    caches = 2 * 12 * 256 * 768
    for rows, size, guided in ((1, 1, False), (8, 4, True)):
        expected = 2 * (weights + rows * caches) / 1e9
        assert bounds.step(size, guided, 0) == pytest.approx(expected, rel=0.02)
    weights = num_parameters(params["encoder"]["stack"]) + (1 + 2 * 12) * 768**2
    assert bounds.encoder(1, False, 0) == pytest.approx(2 * weights / 1e9, rel=0.01)
