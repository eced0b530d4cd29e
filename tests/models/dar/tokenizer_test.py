"""Encoding against the reference, layer by layer; windows; configs that cannot be."""

import functools

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.common.tree import num_parameters
from dar_jax.models.dar.decoder import FlowDecoderConfig
from dar_jax.models.dar.encoder import EncoderConfig
from dar_jax.models.dar.tokenizer import (
    ConditionConfig,
    Tokenizer,
    TokenizerConfig,
    select_windows,
    step_starts,
    window_start,
)
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.nn.fused_attention import Causal
from dar_jax.nn.layers import layer_norm
from dar_jax.nn.patch import patchify
from dar_jax.nn.rope import append_identity, rope_2d
from dar_jax.nn.stack import unstack
from tests.golden import fixtures, models

FOLDERS = ("dar/tokenizer_tiny", "dar/tokenizer_multihead")
FAINT = 0.01
RELEASED_PARAMETERS = 307_444_672
RELEASED_PARTS = {
    "encoder/stack": 56_717_312,
    "encoder/patch_embed": 590_592,
    "encoder/to_code": 6_144,
    "encoder/query_table": 8_192,
    "encoder/query_projection": 6_912,
    "quantizer": 131_072,
    "condition_layers/from_code": 6_144,
    "condition_layers/position_table": 786_432,
    "condition_layers/stack": 56_717_312,
    "decoder/condition_projection": 590_592,
    "decoder/patch_embed": 148_224,
    "decoder/head": 147_648,
    "decoder/stack": 184_243_200,
    "decoder/alignment_head": 7_344_896,
}


@functools.partial(jax.jit, static_argnames="model")
def encode(model, params, image):
    """What the public methods give."""
    tokenizer = model.bind(params)
    quantized = tokenizer.encode(image)
    distances = jnp.sort(tokenizer.quantizer.distances(quantized.z), axis=-1)
    return {
        "z_e": tokenizer.encoder(image),
        "z_normed": quantized.z,
        "codes": quantized.indices,
        "code_margin": distances[..., 1] - distances[..., 0],
        "quant": quantized.codes,
        "cond": tokenizer.condition(quantized.codes),
        "z_normed_faint": tokenizer.encode(FAINT * image).z,
    }


@functools.partial(jax.jit, static_argnames="model")
def trace_layers(model, params, image):
    """What lies between: the layers of the unstacked model, one by one."""
    tokenizer = model.bind(params)
    encoder, condition_layers = tokenizer.encoder, tokenizer.condition_layers
    config = encoder.config
    values = {
        "patchify_out": encoder.patch_embed(patchify(image, config.patch_size)),
        "queries": encoder.queries(),
        "tokens_in": encoder.embed(image),
    }
    rows, columns = (side // config.patch_size for side in image.shape[1:3])
    rope = rope_2d(rows, columns, config.head_dim, config.rope_base)
    values |= {"rope_cos": rope.cos, "rope_sin": rope.sin}
    x = values["tokens_in"]
    mask = Causal(prefix=rows * columns)
    values["attn_mask"] = mask.array(x.shape[1], x.shape[1])
    for i, block in enumerate(encoder.stack.blocks):
        x = block(x, rope=append_identity(rope, encoder.num_tokens), mask=mask)
        values[f"enc_layer{i}"] = x
    values["encoder_out_normed"] = layer_norm(x[:, -encoder.num_tokens :])
    if condition_layers.stack.depth:
        x = condition_layers.embed(tokenizer.encode(image).codes)
        values["dec_in"] = x
        for i, block in enumerate(condition_layers.stack.blocks):
            x = block(x, mask=Causal())
            values[f"dec_layer{i}"] = x
    return values


@functools.partial(jax.jit, static_argnames="model")
def condition_from_indices(model, params, indices):
    return model.bind(params).condition_from_indices(indices)


@pytest.mark.parametrize("folder", FOLDERS)
def test_encode_equals_the_reference(folder):
    model, params = models.tokenizer(folder)
    with fixtures.Compare(folder, "io_encode") as golden:
        image = golden.arrays["image_nhwc"]
        rearranged = einops.rearrange(golden.arrays["image_nchw"], "b c h w -> b h w c")
        np.testing.assert_array_equal(image, rearranged)
        golden.check_all(**encode(model, params, image))
        golden.check_all(**trace_layers(model.unstacked(), unstack(params), image))
        indices = golden.arrays["codes"]
        golden.check("cond_from_codes", condition_from_indices(model, params, indices))


def test_condition_depends_on_earlier_codes_only():
    model, params = models.tokenizer("dar/tokenizer_tiny")
    codes = jax.random.normal(jax.random.key(0), (1, 16, 8))

    @jax.jit
    def sensitivity(codes):
        def token_sums(codes):
            # Squares: the parameter-free norm makes plain sums zero.
            return jnp.sum(jnp.square(model.bind(params).condition(codes)[0, :, ::2]), axis=-1)

        return jnp.linalg.norm(jax.jacrev(token_sums)(codes)[:, 0], axis=-1)

    np.testing.assert_array_equal(np.asarray(sensitivity(codes)) > 0, np.tri(16, dtype=bool))


def test_released_size():
    params = FunctionalModel(Tokenizer, TokenizerConfig()).abstract_params()
    for path, expected in RELEASED_PARTS.items():
        part = functools.reduce(dict.__getitem__, path.split("/"), params)
        assert num_parameters(part) == expected, path
    assert sum(RELEASED_PARTS.values()) == num_parameters(params) == RELEASED_PARAMETERS


def test_bfloat16_changes_only_the_computation():
    model, params = models.tokenizer("dar/tokenizer_tiny")
    coarse = FunctionalModel(Tokenizer, model.config, Compute(dtype="bfloat16"))
    assert coarse.abstract_params() == model.abstract_params()
    image = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3), minval=-1.0)
    z, z_coarse = (encode(m, params, image)["z_normed"] for m in (model, coarse))
    assert z_coarse.dtype == jnp.float32
    difference = np.linalg.norm(z - z_coarse) / np.linalg.norm(z)
    assert 1e-4 < difference < 0.1


def test_window_start_clips_to_the_last_window():
    config = TokenizerConfig(num_tokens=12, num_groups=3, tokens_per_step=6)
    u = jnp.array([0.0, 0.16, 0.17, 0.49, 0.5, 0.99, 1.0])
    np.testing.assert_array_equal(window_start(u, config), [0, 0, 4, 4, 6, 6, 6])


def test_step_starts_of_more_steps_than_groups():
    config = TokenizerConfig(num_tokens=12, num_groups=3)
    assert step_starts(config, 6) == (0, 4, 4, 8, 8, 8)


def test_select_windows_cuts_each_sample_at_its_start():
    config = TokenizerConfig(num_tokens=8, num_groups=4)
    condition = jnp.broadcast_to(jnp.arange(8.0)[:, None], (2, 8, 3))
    windows = select_windows(condition, jnp.array([2, 6]), config)
    np.testing.assert_array_equal(windows[..., 0], [[2, 3], [6, 7]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_tokens=2048), "num_tokens=2048 must not exceed max_tokens=1024"),
        (dict(image_size=100), "image_size=100 must be a multiple of encoder.patch_size=16"),
        (
            dict(encoder=EncoderConfig(patch_size=4), image_size=100),
            "image_size=100 must be a multiple of decoder.patch_size=8",
        ),
        (dict(encoder=EncoderConfig(dim=100)), "encoder.dim=100 .* encoder.head_dim=64"),
        (dict(condition=ConditionConfig(dim=32)), "condition.dim=32 .* condition.head_dim=64"),
        (dict(decoder=FlowDecoderConfig(dim=65)), "decoder.dim=65 .* decoder.head_dim=64"),
        (dict(decoder=FlowDecoderConfig(head_dim=6)), "decoder.head_dim=6 must be a multiple of 4"),
        (dict(num_groups=512), "num_groups=512 must be from 1 to num_tokens=256"),
        (dict(tokens_per_step=512), "tokens_per_step=512 must be from 1 to num_tokens=256"),
    ],
)
def test_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        TokenizerConfig(**options)


@pytest.mark.parametrize("name", ["data_std", "time_shift", "rope_base"])
def test_decoder_refuses_what_is_not_positive(name):
    with pytest.raises(ValueError, match=f"{name}=-2.0 must be above 0"):
        FlowDecoderConfig(**{name: -2.0})
