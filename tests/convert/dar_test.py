"""Official state dicts and configs: both directions, and what is refused."""

import jax
import numpy as np
import pytest

from dar_jax.common.image import resize_bicubic
from dar_jax.convert import dar as convert
from dar_jax.convert.rules import reference_shapes, to_state_dict
from dar_jax.models.dar.llama import Llama, LlamaConfig
from dar_jax.models.dar.tokenizer import Tokenizer, TokenizerConfig
from dar_jax.nn.functional_model import FunctionalModel
from tests.golden import fixtures

TOKENIZERS = ("dar/tokenizer_tiny", "dar/tokenizer_multihead")
PRIORS = ("dar/gpt_tiny", "dar/gpt_gqa_tiny", "dar/gpt_t2i_tiny")
STATISTICS = "quantize.codebook_used"
RELEASED_ENTRIES = 830
"""Names in the released tokenizer's state dict."""

RELEASED_TOKENIZER = {
    "model": {
        "encoder_patch_size": 16,
        "encoder_dim": 768,
        "decoder_dim": 768,
        "num_encoder_layers": 8,
        "num_decoder_layers": 8,
        "vq_dim": 8,
        "vq_codebook_size": 16384,
        "vq_enable": True,
        "num_denoising_steps": 8,
        "num_query_groups": 8,
        "num_all_queries": 256,
        "queries_per_step": 32,
        "query_low_rank": True,
        "diff_decoder": {
            "in_dim": 3,
            "out_dim": 3,
            "dim": 768,
            "cond_dim": 768,
            "patch_size": 8,
            "depth": 12,
            "data_std": 0.6,
            "time_shift": 2,
            "mlp_head": False,
            "share_time_encoding": False,
        },
    }
}
RELEASED_PRIOR = {
    "dim": 1024,
    "n_layer": 24,
    "n_head": 16,
    "vocab_size": 16384,
    "block_size": 256,
    "num_classes": 1000,
}


TINY = "dar/tokenizer_tiny"
ROUNDING = 1e-4  # float32, in another program; images reach 1


def assert_equal(back, state_dict, unused=()):
    assert set(back) == set(state_dict) - set(unused)
    for name, array in back.items():
        assert array.dtype == state_dict[name].dtype
        np.testing.assert_array_equal(array, state_dict[name], err_msg=name)


@pytest.mark.parametrize("folder", TOKENIZERS)
def test_tokenizer_state_dict_round_trip_is_bitwise(folder):
    config = convert.tokenizer_config(fixtures.load_json(folder, "config"))
    state_dict = fixtures.load_state_dict(folder)
    params = convert.tokenizer_params(state_dict, config)
    back = to_state_dict(convert.tokenizer_rules(config), params)
    assert_equal(back, state_dict, unused=[STATISTICS])


@pytest.mark.parametrize("folder", PRIORS)
def test_prior_state_dict_round_trip_is_bitwise(folder):
    config = convert.prior_config(fixtures.load_json(folder, "config"))
    state_dict = fixtures.load_state_dict(folder)
    params = convert.prior_params(state_dict, config)
    assert_equal(to_state_dict(convert.prior_rules(config), params), state_dict)


def test_fresh_parameters_round_trip_is_bitwise():
    config = convert.prior_config(fixtures.load_json("dar/gpt_gqa_tiny", "config"))
    params = jax.device_get(jax.jit(FunctionalModel(Llama, config).init)(jax.random.key(0)))
    state_dict = to_state_dict(convert.prior_rules(config), params)
    back = convert.prior_params(state_dict, config)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_pipelines_are_built_from_reference_state_dicts():
    folder = "dar/tokenizer_tiny"
    tokenizer = convert.tokenizer_from_reference(
        fixtures.load_state_dict(folder), fixtures.load_json(folder, "config"), image_size=64
    )
    assert tokenizer.config.image_size == 64
    folder = "dar/gpt_tiny"
    prior = convert.prior_from_reference(
        fixtures.load_state_dict(folder), fixtures.load_json(folder, "config")
    )
    assert prior.config.num_tokens == tokenizer.config.num_tokens


def test_released_tokenizer_is_the_default_config():
    config = convert.tokenizer_config(RELEASED_TOKENIZER)
    assert config == TokenizerConfig(tokens_per_step=32)
    assert convert.tokenizer_config(RELEASED_TOKENIZER["model"]) == config
    like = FunctionalModel(Tokenizer, config).abstract_params()
    shapes = reference_shapes(convert.tokenizer_rules(config), like)
    assert len(shapes) + len([STATISTICS]) == RELEASED_ENTRIES
    assert shapes["patchify.weight"] == (768, 3, 16, 16)
    assert shapes["diff_decoder.net.repa_out.4.weight"] == (768, 2048)


def test_released_prior_is_the_default_config():
    assert convert.prior_config(RELEASED_PRIOR) == LlamaConfig()


@pytest.mark.parametrize("name", ["freqs_cis", "layers.0.attention.kv_cache.k_cache"])
def test_prior_ignores_buffers(name):
    folder = "dar/gpt_gqa_tiny"
    config = convert.prior_config(fixtures.load_json(folder, "config"))
    state_dict = fixtures.load_state_dict(folder)
    params = convert.prior_params(state_dict | {name: np.zeros(3)}, config)
    assert_equal(to_state_dict(convert.prior_rules(config), params), state_dict)


def test_missing_tensor_is_named():
    folder = "dar/gpt_gqa_tiny"
    config = convert.prior_config(fixtures.load_json(folder, "config"))
    state_dict = fixtures.load_state_dict(folder)
    del state_dict["layers.1.feed_forward.w3.weight"]
    with pytest.raises(ValueError, match=r"missing layers\.1\.feed_forward\.w3\.weight"):
        convert.prior_params(state_dict, config)


@pytest.fixture(scope="module")
def whole():
    """State dict and config of a tokenizer, what it is, an image and its noise."""
    state_dict = fixtures.load_state_dict(TINY)
    config = fixtures.load_json(TINY, "config")["model"]
    image, noise = jax.random.uniform(jax.random.key(0), (2, 2, 64, 64, 3), minval=-1)
    return state_dict, config, convert.tokenizer_from_reference(state_dict, config), image, noise


def test_file_without_the_alignment_head_converts(whole, caplog):
    state_dict, config, tokenizer, image, noise = whole
    lacking = {name: a for name, a in state_dict.items() if "repa_out" not in name}
    assert len(lacking) < len(state_dict)
    with caplog.at_level("INFO", logger="absl"):
        other = convert.tokenizer_from_reference(lacking, config)
    assert "lacks the alignment head" in caplog.text
    assert other.config.decoder.feature_layer is None
    decoded = [each.decode(each.encode(image), noise=noise) for each in (tokenizer, other)]
    np.testing.assert_array_equal(*decoded)


def test_tokenizer_without_a_codebook_decodes_unit_vectors(whole):
    state_dict, config, tokenizer, image, noise = whole
    lacking = {name: a for name, a in state_dict.items() if not name.startswith("quantize.")}
    other = convert.tokenizer_from_reference(lacking, config | {"vq_enable": False})
    assert other.codebook_size is None
    assert_equal(convert.tokenizer_state_dict(other.params, other.config), lacking)
    quantized = tokenizer.model.bind(tokenizer.params).encode(image)
    np.testing.assert_allclose(other.encode(image), quantized.z, atol=ROUNDING)
    decoded = other.decode(quantized.nearest, noise=noise)
    expected = tokenizer.decode(quantized.indices, noise=noise)
    np.testing.assert_allclose(decoded, expected, atol=ROUNDING)
    made = other.reconstruct(image, rng=jax.random.key(0))
    assert made.images.shape == image.shape and made.indices is None
    with pytest.raises(ValueError, match="codes"):
        other.decode(quantized.indices, noise=noise)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(24, 24), (80, 64), pytest.param(64, 64, marks=pytest.mark.slow)],
)
def test_larger_output_is_resized_in_the_end(whole, size, expected):
    state_dict, config, tokenizer, image, noise = whole
    other = convert.tokenizer_from_reference(state_dict, config | {"output_resolution": size})
    indices = tokenizer.encode(image)
    decoded = tokenizer.decode(indices, noise=noise)
    np.testing.assert_allclose(
        other.decode(indices, noise=noise),
        resize_bicubic(decoded, (expected, expected)),
        atol=ROUNDING,
    )


def test_missing_config_key_is_named():
    broken = {k: v for k, v in RELEASED_TOKENIZER["model"].items() if k != "vq_dim"}
    with pytest.raises(ValueError, match="lacks the key 'vq_dim'"):
        convert.tokenizer_config(broken)
    with pytest.raises(ValueError, match="lacks the key 'n_layer'"):
        convert.prior_config({k: v for k, v in RELEASED_PRIOR.items() if k != "n_layer"})


def test_config_value_of_another_type_is_one_line():
    with pytest.raises(ValueError, match="reference config holds a value of another type"):
        convert.prior_config({**RELEASED_PRIOR, "dim": None})
    config = convert.prior_config({**RELEASED_PRIOR, "norm_eps": "1e-5"})  # as YAML may have it
    assert config.norm_epsilon == 1e-5
