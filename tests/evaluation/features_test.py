"""Feature networks by name: batches, devices, names and bad input."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dar_jax.common import model_dir
from dar_jax.convert import inception as convert_inception
from dar_jax.evaluation import features
from dar_jax.evaluation.features import FeatureExtractor, metric_name
from dar_jax.models.frozen import pretrained
from dar_jax.models.frozen.lpips import Lpips, LpipsConfig, StageConfig
from dar_jax.nn.functional_model import FunctionalModel
from tests.models.inception_test import scaled_state_dict
from tests.random_params import random_params

TOLERANCE = 1e-5  # float32; another batch size may be another order of sums
SMALL = FunctionalModel(Lpips, LpipsConfig((StageConfig((4,)), StageConfig((6,), pool=2))))
PIXELS = np.random.default_rng(0).integers(0, 256, (11, 24, 16, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    params = random_params(SMALL.abstract_params())
    network = features.Network(SMALL, lambda weights: params, features._vgg16_features)
    monkeypatch.setitem(features.EXTRACTORS, "vgg16", network)


def test_features_do_not_depend_on_batch_size_or_devices():
    extractor = FeatureExtractor("vgg16", batch_size=11)
    assert extractor.dims == {"pool": 6}
    expected = extractor.features(PIXELS)["pool"]
    assert expected.shape == (11, 6) and np.std(expected, axis=0).max() > 100 * TOLERANCE
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("data", "tensor"))
    sharded = NamedSharding(mesh, PartitionSpec("data"))
    for other in (
        FeatureExtractor("vgg16", batch_size=4),
        FeatureExtractor("vgg16", batch_size=5, sharding=sharded),  # rounded up to 8
    ):
        np.testing.assert_allclose(other.features(PIXELS)["pool"], expected, rtol=TOLERANCE)
    assert extractor.features(PIXELS[:0])["pool"].shape == (0, 6)


def test_convolutions_are_in_full_float32_on_every_platform():
    network, pixels = features.EXTRACTORS["vgg16"], jax.ShapeDtypeStruct((1, 64, 64, 3), "uint8")
    with jax.default_matmul_precision("bfloat16"):
        program = features._compute.lower(
            network.model, network.apply, SMALL.abstract_params(), pixels
        ).as_text()
    assert program.count("stablehlo.convolution") == 2
    assert program.count("precision HIGHEST") == 2 * 2  # of both operands


@pytest.mark.slow
def test_features_of_inception_do_not_depend_on_batch_size_or_devices(monkeypatch):
    inception = features.EXTRACTORS["inception"]
    like = inception.model.abstract_params()
    params = convert_inception.from_reference(scaled_state_dict(), inception.model.config, like)
    network = dataclasses.replace(inception, load=lambda weights: params)
    monkeypatch.setitem(features.EXTRACTORS, "inception", network)
    extractor = FeatureExtractor("inception", batch_size=3)
    assert extractor.dims == {"pool": 2048, "spatial": 2023, "logits": 1008}
    expected = extractor.features(PIXELS)
    sharded = NamedSharding(Mesh(jax.devices(), "data"), PartitionSpec("data"))
    found = FeatureExtractor("inception", batch_size=8, sharding=sharded).features(PIXELS)
    for kind, array in expected.items():
        assert array.shape == (len(PIXELS), extractor.dims[kind])
        np.testing.assert_allclose(found[kind], array, rtol=0, atol=1e-4)


def test_small_images_are_enlarged_and_large_ones_are_not():
    extractor = FeatureExtractor("vgg16", batch_size=1)
    flat = np.full((1, 8, 8, 3), 40, np.uint8)
    large = np.full((1, 64, 64, 3), 40, np.uint8)
    np.testing.assert_allclose(*(extractor.features(p)["pool"] for p in (flat, large)), rtol=1e-5)
    striped = np.zeros((1, 128, 64, 3), np.uint8)
    striped[:, ::2] = 80
    fine = extractor.features(striped)["pool"]
    assert np.abs(fine - extractor.features(large)["pool"]).max() > 0.1, "stripes are gone"


@pytest.mark.parametrize("pixels", [PIXELS.astype(np.float32), PIXELS[0], PIXELS[..., :1]])
def test_other_arrays_are_refused(pixels):
    with pytest.raises(ValueError, match=r"expected uint8 \(N, height, width, 3\)"):
        FeatureExtractor("vgg16").features(pixels)


def test_only_inception_gives_a_fid():
    names = ("fid", "sfid", "kid", "precision")
    assert [metric_name(name, "inception") for name in names] == list(names)
    assert metric_name("fid", "vgg16") == "fd_vgg16"
    assert metric_name("kid", "vgg16") == "kd_vgg16"
    assert metric_name("precision", "vgg16") == "precision_vgg16"


def test_unknown_network_and_missing_weights_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="features='resnet' must be one of inception, vgg16"):
        FeatureExtractor("resnet")
    with pytest.raises(ValueError, match=r"--config\.convert\.net=inception") as caught:
        FeatureExtractor("inception")
    assert "\n" not in str(caught.value)
    model_dir.save_model(tmp_path / "model", "dinov2", {}, {}, {})
    with pytest.raises(ValueError, match="holds a dinov2, expected a inception"):
        pretrained.inception_params(str(tmp_path))
