"""Heads that share the rows of a cache, as on TPUs: the same logits and tokens."""

import types

import jax
import pytest

from dar_jax.models.dar import decoding
from dar_jax.models.dar.llama import SIZES, Llama, LlamaConfig
from dar_jax.nn.functional_model import FunctionalModel
from tests.golden import models
from tests.models.dar.llama_test import FOLDERS, check_cached_decoding, check_class_generation


@pytest.fixture
def as_on_a_tpu(monkeypatch):
    """Caches as for TPUs, whose rows have 128 numbers."""
    devices = [types.SimpleNamespace(platform="tpu")]
    monkeypatch.setattr(decoding, "traced_devices", lambda: devices)
    jax.clear_caches()
    yield
    jax.clear_caches()


def test_heads_share_rows_on_tpus_only(request):
    def rows(size, **changes):
        model = FunctionalModel(Llama, LlamaConfig(**SIZES[size], **changes))
        caches = jax.eval_shape(lambda: model.bind(model.init(jax.random.key(0))).empty_caches(2))
        return caches[0].keys.shape

    assert rows("l") == (2, 16, 0, 64)
    request.getfixturevalue("as_on_a_tpu")
    assert rows("l") == (2, 8, 0, 128)
    assert rows("xl") == (2, 10, 0, 128)
    assert rows("b", num_kv_heads=3) == (2, 3, 0, 64)  # do not pair
    assert rows("b", num_kv_heads=6) == (2, 3, 0, 128)


@pytest.mark.parametrize("folder", FOLDERS)
def test_logits_are_those_of_the_full_forward(folder, as_on_a_tpu):
    config = models.prior(folder)[0].config
    heads = config.num_kv_heads or config.num_heads
    assert decoding.heads_together(config.head_dim, heads) == heads > 1
    check_cached_decoding(folder)


def test_generation_equals_the_reference(as_on_a_tpu):
    check_class_generation()
