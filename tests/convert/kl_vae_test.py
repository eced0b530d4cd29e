"""The official autoencoder: every tensor both ways, and through `--mode=convert`."""

import logging

import jax
import numpy as np
import pytest

from configs import common, imagenet_kl_vae
from dar_jax.common import model_dir
from dar_jax.common.files import write_safetensors
from dar_jax.config import build as read_config
from dar_jax.convert import checkpoints, kl_vae, rules
from dar_jax.kinds.loading import from_pretrained
from dar_jax.models.kl_vae import KlVae, KlVaeConfig
from dar_jax.modes import convert as mode
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.pipelines.kl_vae import KlVaePipeline
from tests.golden import fixtures, models
from tests.models.kl_vae_test import to_nchw, to_nhwc

FOLDER = "transdiff/kl_vae_tiny"
NUM_TENSORS = 312
WIDTHS = (128, 128, 256, 256, 512)


def test_released_names_and_shapes():
    """Those of the published checkpoint, of which a few are spelled out."""
    config = kl_vae.architecture({})
    assert config == KlVaeConfig()
    shapes = rules.reference_shapes(
        kl_vae.table(config), FunctionalModel(KlVae, config).abstract_params()
    )
    assert len(shapes) == NUM_TENSORS
    expected = {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.4.attn.1.proj_out.weight": (512, 512, 1, 1),
        "quant_conv.weight": (32, 32, 1, 1),
        "post_quant_conv.weight": (16, 16, 1, 1),
        "decoder.conv_in.weight": (512, 16, 3, 3),
        "decoder.conv_out.bias": (3,),
    }
    for level in (2, 4):
        shape = (WIDTHS[level], WIDTHS[level - 1], 1, 1)
        expected[f"encoder.down.{level}.block.0.nin_shortcut.weight"] = shape
    for level in (1, 3):
        shape = (WIDTHS[level], WIDTHS[level + 1], 1, 1)
        expected[f"decoder.up.{level}.block.0.nin_shortcut.weight"] = shape
    assert {name: shapes[name] for name in expected} == expected
    assert sum("nin_shortcut" in name for name in shapes) == 2 * 4
    assert sum(".downsample." in n or ".upsample." in n for n in shapes) == 2 * 8


def test_conversion_is_reversible():
    state_dict = fixtures.load_state_dict(FOLDER)
    model, params = models.kl_vae(FOLDER)
    back = kl_vae.state_dict(params, model.config)
    assert len(back) == NUM_TENSORS and back.keys() == state_dict.keys()
    for name, array in back.items():
        np.testing.assert_array_equal(array, state_dict[name], err_msg=name)


@pytest.mark.slow
def test_converted_model_directory_encodes_and_decodes_like_the_reference(tmp_path, caplog):
    state_dict = fixtures.load_state_dict(FOLDER)
    extra = {"loss.logvar": np.zeros(1, np.float32)}
    write_safetensors(tmp_path / "kl16.safetensors", {**state_dict, **extra})
    config = imagenet_kl_vae.get_config()
    config.model = common.block(models.kl_vae(FOLDER)[0].config)
    config.convert.source = str(tmp_path / "kl16.safetensors")
    logging.getLogger("absl").addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger="absl"):
        mode.convert(read_config(config), str(tmp_path))
    logging.getLogger("absl").removeHandler(caplog.handler)
    assert "Left out 1 tensors that are no parameters: loss.logvar" in caplog.text

    loaded = from_pretrained(tmp_path)
    assert isinstance(loaded, KlVaePipeline)
    golden = fixtures.Compare(FOLDER)
    golden.check("moments", to_nchw(loaded.encode(to_nhwc(golden.arrays["image"]))))
    golden.check("decoded", to_nchw(loaded.decode(to_nhwc(golden.arrays["z"]))))
    with pytest.raises(ValueError, match=r"latents has shape .*expected \(B, h, w, 16\)"):
        loaded.decode(np.zeros((1, 4, 4, 4), np.float32))
    with pytest.raises(ValueError, match="40x64 pixels: both sides must be multiples"):
        loaded.encode(np.zeros((1, 40, 64, 3), np.float32))

    config.convert.update(source="", to="torch")
    mode.convert(read_config(config), str(tmp_path))
    back = checkpoints.read_checkpoint(str(tmp_path / "kl_vae.safetensors")).state_dict
    assert back.keys() == state_dict.keys()
    assert all(np.array_equal(back[name], array) for name, array in state_dict.items())


def test_pipeline_of_a_state_dict_holds_its_weights():
    reference = fixtures.load_json(FOLDER, "config")
    pipeline = kl_vae.from_reference(fixtures.load_state_dict(FOLDER), reference)
    assert pipeline.config == models.kl_vae(FOLDER)[0].config
    expected = models.kl_vae(FOLDER)[1]
    assert jax.tree.all(jax.tree.map(np.array_equal, pipeline.params, expected))


@pytest.mark.parametrize("name", ["quant_conv.bias", "decoder.up.4.upsample.conv.weight"])
def test_missing_tensor_is_named(name):
    state_dict = fixtures.load_state_dict(FOLDER)
    del state_dict[name]
    with pytest.raises(ValueError, match=f"missing {name}$"):
        kl_vae.params(state_dict, models.kl_vae(FOLDER)[0].config)


def test_surplus_tensor_of_a_part_is_named():
    state_dict = fixtures.load_state_dict(FOLDER) | {"decoder.up.5.x": np.zeros(1, np.float32)}
    with pytest.raises(ValueError, match=r"surplus decoder\.up\.5\.x$"):
        kl_vae.params(state_dict, models.kl_vae(FOLDER)[0].config)


def test_unsupported_variant_is_refused():
    with pytest.raises(ValueError, match="reference config double_z=False is not supported"):
        kl_vae.architecture({"model": {"double_z": False}})


@pytest.mark.parametrize("config", [{"latent_scale": 0.5}, {"model": {"latent_scale": 0.5}}])
def test_latent_scale_is_read_wherever_it_stands(config):
    assert kl_vae.architecture(config).latent_scale == 0.5


def test_model_directory_keeps_the_latent_scale(tmp_path):
    config = KlVaeConfig(width=4, width_factors=(1,), attention_levels=(), num_groups=2)
    model = FunctionalModel(KlVae, config)
    settings = {"width": 4, "width_factors": [1], "attention_levels": [], "num_groups": 2}
    settings["latent_scale"] = 1.25
    model_dir.save_model(tmp_path / "m", "kl_vae", settings, model.init(jax.random.key(0)), {})
    assert from_pretrained(tmp_path / "m").config.latent_scale == 1.25
