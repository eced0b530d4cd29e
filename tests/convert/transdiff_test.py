"""Conversion of TransDiff checkpoints: both ways, strictly, and their configs."""

import argparse
import dataclasses

import jax
import numpy as np
import pytest

from configs import common, imagenet_kl_vae, imagenet_transdiff
from dar_jax.config import build as read_config
from dar_jax.convert import transdiff as convert
from dar_jax.convert.checkpoints import read_checkpoint
from dar_jax.convert.rules import reference_shapes
from dar_jax.kinds.loading import from_pretrained
from dar_jax.models.transdiff.model import TransDiff
from dar_jax.modes import convert as mode
from dar_jax.nn.functional_model import FunctionalModel
from tests.golden import fixtures, models
from tests.modes.convert_test import assert_same_params

VAE = "transdiff/kl_vae_tiny"
FOLDERS = ("transdiff/transdiff_tiny", "transdiff/transdiff_mrar_tiny")


@pytest.mark.parametrize("folder", FOLDERS)
def test_conversion_is_lossless_both_ways(folder):
    model, params = models.transdiff(folder)
    reference = fixtures.load_state_dict(folder)
    back = convert.transdiff_state_dict(params, model.config)
    assert set(back) == set(reference)
    for name, array in reference.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_pipeline_is_built_from_a_reference_state_dict():
    folder = FOLDERS[1]
    pipeline = convert.from_reference(
        fixtures.load_state_dict(folder), fixtures.load_json(folder, "config")
    )
    model, params = models.transdiff(folder)
    assert pipeline.config == model.config and pipeline.config.num_references == 4
    jax.tree.map(np.testing.assert_array_equal, pipeline.params, params)


def test_tensors_that_do_not_fit_are_named():
    folder = FOLDERS[0]
    state_dict = fixtures.load_state_dict(folder)
    config = convert.transdiff_config(fixtures.load_json(folder, "config"))
    lacking = {name: a for name, a in state_dict.items() if name != "fake_latent"}
    with pytest.raises(ValueError, match=r"missing fake_latent"):
        convert.transdiff_params(lacking, config)
    with pytest.raises(ValueError, match=r"surplus ema"):
        convert.transdiff_params(state_dict | {"ema": np.zeros(1)}, config)
    other = dataclasses.replace(config, num_references=4, reference_patch_size=2)
    with pytest.raises(ValueError, match=r"mask_token has \(1, 1, 56\), expected \(1, 64, 56\)"):
        convert.transdiff_params(state_dict, other)


def test_mlp_ratio_is_the_config_s():
    reference = fixtures.load_json(FOLDERS[0], "config")["model"]
    assert convert.transdiff_config(reference).mlp_ratio == 4
    config = convert.transdiff_config(reference | {"mlp_ratio": 2.5})
    like = FunctionalModel(TransDiff, config).abstract_params()
    shapes = reference_shapes(convert.transdiff_rules(config), like)
    assert shapes["encoder_blocks.1.mlp.fc1.weight"] == (140, 56)
    assert shapes["diffdecoder.net.res_blocks.0.mlp.fc2.weight"] == (56, 140)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(decoder_embed_dim=48), "encoder_embed_dim=56 must equal decoder_embed_dim=48"),
        (dict(layer_norm_eps=1e-5), "layer_norm_eps=1e-05 is not supported"),
        (dict(buffer_size=None), None),
    ],
)
def test_configs_that_are_not_supported_are_refused(changes, message):
    reference = fixtures.load_json(FOLDERS[0], "config")["model"] | changes
    if message is None:
        del reference["buffer_size"]
        message = "lacks the key 'buffer_size'"
    with pytest.raises(ValueError, match=message):
        convert.transdiff_config(reference)


def convert_file(config, model, source, workdir):
    config.model = common.block(model)
    config.convert.source = str(source)
    mode.convert(read_config(config), str(workdir))


def test_official_files_become_a_model_directory_and_go_back(tmp_path):
    torch = pytest.importorskip("torch")
    state_dict, vae = (fixtures.load_state_dict(folder) for folder in (FOLDERS[0], VAE))
    average, vae = ({n: torch.tensor(a) for n, a in d.items()} for d in (state_dict, vae))
    content = dict(model={n: -t for n, t in average.items()}, model_ema=average, epoch=799)
    content |= dict(optimizer={"state": {}}, scaler={}, args=argparse.Namespace(lr=1e-4))
    torch.save(content, tmp_path / "checkpoint-last.pth")
    torch.save({"model": vae}, tmp_path / "kl16.ckpt")
    (vae_model, vae_params), (model, params) = models.kl_vae(VAE), models.transdiff(FOLDERS[0])
    vae_config, config = imagenet_kl_vae.get_config(), imagenet_transdiff.get_config("b")
    convert_file(vae_config, vae_model.config, tmp_path / "kl16.ckpt", tmp_path / "vae")
    config.vae = str(tmp_path / "vae")
    source = tmp_path / "checkpoint-last.pth"
    convert_file(config, model.config, source, tmp_path / "transdiff")

    pipeline = from_pretrained(tmp_path / "transdiff")
    assert (pipeline.prior.config, pipeline.vae.config) == (model.config, vae_model.config)
    assert_same_params(pipeline.prior.params, params)
    assert_same_params(pipeline.vae.params, vae_params)

    config.convert.update(source="", to="torch")
    mode.convert(read_config(config), str(tmp_path / "transdiff"))
    back = read_checkpoint(str(tmp_path / "transdiff/transdiff.safetensors")).state_dict
    assert_same_params(back, state_dict)

    config.convert.to = "jax"
    other = dataclasses.replace(model.config, channels=4)
    with pytest.raises(ValueError, match=r"checkpoint-last.pth: .*misshapen diffdecoder.net"):
        convert_file(config, other, source, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("averaged", [True, False])
def test_published_file_gives_its_average(tmp_path, averaged):
    """`checkpoint-last.pth`: weights, their average if there is one, arguments as a Namespace."""
    torch = pytest.importorskip("torch")
    weights = {"fake_latent": torch.ones(1, 2, dtype=torch.bfloat16)}
    average = {"fake_latent": torch.full((1, 2), 2.0)} if averaged else {}
    content = dict(model=weights, model_ema=average, epoch=3, args=argparse.Namespace(lr=1e-4))
    torch.save(content, tmp_path / "checkpoint-last.pth")
    checkpoint = read_checkpoint(str(tmp_path / "checkpoint-last.pth"))
    assert checkpoint.container == ("model_ema" if averaged else "model")
    np.testing.assert_array_equal(checkpoint.state_dict["fake_latent"], [[1.0 + averaged] * 2])
    assert checkpoint.state_dict["fake_latent"].dtype == np.float32
