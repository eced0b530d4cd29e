"""Frozen networks from the command line of `--mode=convert`, as their users read them."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.numpy

from configs import imagenet_tokenizer
from dar_jax.config import build as read_config
from dar_jax.convert import dinov2, frozen, inception, lpips, rules
from dar_jax.convert.config import ConvertConfig
from dar_jax.models.frozen import pretrained
from dar_jax.models.frozen.dinov2 import SIZES, Dinov2
from dar_jax.models.frozen.inception import Inception, InceptionConfig
from dar_jax.models.frozen.lpips import NETWORKS, Lpips
from dar_jax.modes import convert as mode
from dar_jax.nn.functional_model import FunctionalModel


def random_state_dict(table, model):
    shapes = rules.reference_shapes(table, model.abstract_params())
    return {n: np.full(s, i, np.float32) for i, (n, s) in enumerate(shapes.items())}


def convert(tmp_path, net, *state_dicts):
    paths = []
    for i, state_dict in enumerate(state_dicts):
        paths.append(str(tmp_path / f"{i}.safetensors"))
        safetensors.numpy.save_file(state_dict, paths[-1])
    config = imagenet_tokenizer.get_config()
    config.convert.update(net=net, source=",".join(paths))
    mode.convert(read_config(config), str(tmp_path))


def test_dinov2_tells_its_size_and_is_found_by_the_loss(tmp_path, monkeypatch):
    small = dataclasses.replace(SIZES["s"], depth=1)
    monkeypatch.setitem(SIZES, "s", small)
    state_dict = random_state_dict(dinov2.table(small), FunctionalModel(Dinov2, small))
    convert(tmp_path, "dinov2", state_dict)
    params = pretrained.dinov2_params(str(tmp_path), small)
    np.testing.assert_array_equal(params["class_token"], state_dict["cls_token"].ravel())
    with pytest.raises(ValueError, match=r"holds DINOv2 with .*384.*feature_dim=768 asks for"):
        pretrained.dinov2_params(str(tmp_path), SIZES["b"])


def test_lpips_joins_a_classifier_and_its_heads(tmp_path):
    model = FunctionalModel(Lpips, NETWORKS["alexnet"])
    whole = random_state_dict(lpips.table(model.config), model)
    heads = {name: array for name, array in whole.items() if name.startswith("lin")}
    trunk = {f"features.{n.split('.', 2)[2]}": a for n, a in whole.items() if n not in heads}
    convert(tmp_path, "lpips_alexnet", trunk, heads)
    params = pretrained.lpips_params(str(tmp_path), "alexnet")
    expected = lpips.from_reference(whole, model.config, model.abstract_params())
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(params), jax.tree.leaves(expected))


def test_inception_is_found_by_evaluation(tmp_path, monkeypatch):
    small = InceptionConfig(blocks=(), spatial_block="")
    for module in (frozen, pretrained):
        monkeypatch.setattr(module, "InceptionConfig", lambda: small)
    state_dict = random_state_dict(inception.table(small), FunctionalModel(Inception, small))
    convert(tmp_path, "inception", state_dict | {"fc.bias": np.zeros(1008, np.float32)})
    params = pretrained.inception_params(str(tmp_path))
    variance = params["conv2d_4a_3x3"]["variance"]
    np.testing.assert_array_equal(variance, state_dict["Conv2d_4a_3x3.bn.running_var"])
    np.testing.assert_array_equal(params["logits"]["kernel"], state_dict["fc.weight"].T)


def test_unknown_network_and_missing_heads_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="net='vgg' must be one of dinov2, lpips_vgg16"):
        ConvertConfig(net="vgg")
    with pytest.raises(ValueError, match=r"missing lin0\.model\.1\.weight") as caught:
        convert(tmp_path, "lpips_alexnet", {"features.0.bias": np.zeros(64, np.float32)})
    assert "\n" not in str(caught.value) and not (tmp_path / "model").exists()
