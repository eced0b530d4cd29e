"""D-AR's prior that draws with matrices or caches in int8."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.common.tree import tree_bytes
from dar_jax.models.dar import draws
from dar_jax.models.dar.decoding import READ_PER_TOKEN, decoding_params
from dar_jax.models.dar.llama import Llama
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.parallel.sharding import MeshConfig, make_mesh
from dar_jax.pipelines.dar import DarPipeline, PriorPipeline, TokenizerPipeline
from dar_jax.sampling import autoregressive
from dar_jax.sampling.logits import SamplingConfig
from tests.golden import models
from tests.models.dar.llama_test import cached_logits, conditions, image_tokens

LABELS = (3, 1)
WEIGHTS, CACHE = {"decode_weights": "int8"}, {"decode_cache": "int8"}
STORES = (WEIGHTS, CACHE, WEIGHTS | CACHE)
NAMES = ("weights", "cache", "both")
CLOSE = 0.03  # relative; half a step of 127 is 0.4 % of the largest number of a row


def prior_of(folder="dar/gpt_tiny", **compute):
    model, params = models.prior(folder)
    return FunctionalModel(Llama, model.config, Compute(**compute)), params


@pytest.fixture(scope="module", params=STORES, ids=NAMES)
def dar(request):
    tokenizer = TokenizerPipeline(*models.tokenizer("dar/tokenizer_tiny"))
    return DarPipeline(PriorPipeline(*prior_of(**request.param)), tokenizer)


@pytest.mark.parametrize(
    ("folder", "stores", "dtype"),
    [
        ("dar/gpt_tiny", WEIGHTS, "float32"),
        ("dar/gpt_gqa_tiny", CACHE, "float32"),
        ("dar/gpt_t2i_tiny", WEIGHTS | CACHE, "bfloat16"),
    ],
)
def test_logits_stay_close(folder, stores, dtype):
    model, params = prior_of(folder)
    inputs = conditions(model), image_tokens(model)
    exact = cached_logits(model.unstacked(), decoding_params(params), *inputs)
    model, _ = prior_of(folder, dtype=dtype, **stores)
    params = decoding_params(params, model.compute.decode_weights)
    logits = cached_logits(model.unstacked(), params, *inputs)
    assert logits.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(logits - exact) / np.linalg.norm(exact) < CLOSE


def test_what_every_token_reads_is_in_int8():
    pipeline = PriorPipeline(*prior_of(dtype="bfloat16", **WEIGHTS))
    params, half = pipeline.sampling_params, PriorPipeline(*prior_of(dtype="bfloat16"))
    read = {name: params[name] for name in READ_PER_TOKEN}
    wide = [leaf for leaf in jax.tree.leaves(read) if leaf.dtype != jnp.int8]
    assert all(leaf.ndim == 1 or len(leaf) == 1 for leaf in wide)  # norms and scales
    whole = tree_bytes([half.sampling_params[name] for name in READ_PER_TOKEN])
    assert 2 * (tree_bytes(read) - tree_bytes(wide)) + tree_bytes(wide) < 1.2 * whole
    assert params["token_embed"]["embedding"].dtype == jnp.float32


def test_compiled_decoding_holds_no_copy_of_a_matrix(monkeypatch):
    monkeypatch.setattr("dar_jax.nn.int8.COLUMNS", 16)
    pipeline = PriorPipeline(*prior_of(**WEIGHTS))
    model, params, config = pipeline.model.unstacked(), pipeline.sampling_params, pipeline.config
    decoder = autoregressive.TokenDecoder(model, 1, SamplingConfig(), guided=False)
    rngs, scales = jax.random.split(jax.random.key(0), 1), jnp.ones(config.num_tokens)
    condition = draws.embed_rows(model, params, jnp.zeros(1, jnp.int32), guided=False)
    prefix = jnp.zeros((1, 0), jnp.int32)
    slots = dict(num_slots=config.num_tokens)
    state = autoregressive.prefill(decoder, params, condition, prefix, rngs, scales, None, **slots)
    decode = autoregressive.decode.lower(
        decoder, params, state, rngs, scales, start=1, stop=config.num_tokens, **slots
    )
    text = decode.compile().as_text()
    shape = f"{config.dim},{2 * config.ffn_dim}"
    assert f"s8[{shape}]" in text and f"f32[{shape}]" not in text
    assert re.search(rf"f32\[{config.dim},16\]\S* convert", text)


def test_stream_ends_in_what_is_generated(dar):
    options = dict(rng=0, guidance_scale=2.0)
    generated = dar.generate(LABELS, **options)
    last = [*dar.stream(LABELS, **options)][-1]
    np.testing.assert_array_equal(last.indices, generated.indices)
    np.testing.assert_array_equal(last.images, generated.images)
    indices = dar.prior.generate_indices(np.array(LABELS), **options)
    np.testing.assert_array_equal(indices, generated.indices)


def test_an_image_does_not_depend_on_its_batch_or_on_lookahead(dar):
    options = dict(rng=0, guidance_scale=2.0)
    indices = dar.generate(LABELS, **options).indices
    later = dar.generate(LABELS[1:], first_index=1, **options).indices
    np.testing.assert_array_equal(later[0], indices[1])
    ahead = dar.generate(LABELS, **options, lookahead=3).indices
    np.testing.assert_array_equal(ahead, indices)


def test_eight_devices_draw_the_indices_of_one():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    split, whole = (
        PriorPipeline(*prior_of(**WEIGHTS, **CACHE), mesh=devices).generate_indices(
            np.arange(mesh.size), rng=0, guidance_scale=(1.1, 4.0)
        )
        for devices in (mesh, None)
    )
    np.testing.assert_array_equal(split, whole)


def test_prefix_is_kept(dar):
    options = dict(rng=0, guidance_scale=2.0)
    indices = dar.generate(LABELS, **options).indices
    again = dar.generate(LABELS, **options, prefix=indices[:, :5]).indices
    np.testing.assert_array_equal(again, indices)


def test_weights_that_are_not_finite_are_refused():
    model, params = prior_of(**WEIGHTS)
    output = {"kernel": params["output"]["kernel"].at[0, 0].set(jnp.nan)}
    pipeline = PriorPipeline(model, params | {"output": output})
    with pytest.raises(ValueError, match="^output/kernel holds numbers that are not finite"):
        pipeline.generate_indices(np.array(LABELS), rng=0)
