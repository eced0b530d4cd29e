"""Bounds of sampling against the published ones."""

import dataclasses

import pytest

from dar_jax.device_speed import DeviceSpeed
from dar_jax.models.dar.llama import SIZES, LlamaConfig
from dar_jax.models.dar.tokenizer import TokenizerConfig
from dar_jax.sampling_bounds import SamplingBounds

H200 = DeviceSpeed(bandwidth=4.3e12, product_bandwidth=4.3e12, flops=790e12)
SMALL_TRAFFIC = 0.04  # the published bounds also count written caches and logits


def bounds(size):
    return SamplingBounds(LlamaConfig(**SIZES[size]), TokenizerConfig(), 2, H200)


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
