"""FID's Inception against its PyTorch port, and what holds without it."""

import dataclasses

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.convert import inception, rules
from dar_jax.models.frozen import inception as network
from dar_jax.models.frozen.inception import Inception, InceptionConfig, resize_bilinear
from dar_jax.nn.functional_model import FunctionalModel

TOLERANCE = 1e-4  # float32 through 94 convolutions; features reach 8
RESIZE_TOLERANCE = 1e-4  # of 255: float32
NUM_CONVS = 94  # of the published network


def scaled_state_dict(seed=0):
    """Random weights under the port's names that neither vanish nor explode.

    With the initialisation that frameworks use, all 2048 features are zero but for rounding.
    """
    like = FunctionalModel(Inception, InceptionConfig()).abstract_params()
    shapes = rules.reference_shapes(inception.table(InceptionConfig()), like)
    rng = np.random.default_rng(seed)

    def draw(name, shape):
        if len(shape) > 1:
            return rng.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape)
        positive = name.endswith(("bn.weight", "running_var"))
        return rng.uniform(0.7, 1.3, shape) if positive else rng.normal(0, 0.2, shape)

    state_dict = {name: draw(name, shape).astype(np.float32) for name, shape in shapes.items()}
    return {**state_dict, "fc.bias": np.ones(network.NUM_LOGITS, np.float32)}


def port_features(state_dict, path, pixels):
    """Outputs of torch-fidelity's module: pool, spatial and unbiased logits."""
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.save({name: torch.tensor(array) for name, array in state_dict.items()}, path)
    port = module.FeatureExtractorInceptionV3(
        "port", ["2048", "logits_unbiased"], feature_extractor_weights_path=path
    )
    spatial = []
    port.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, output: spatial.append(output))
    pool, logits = port(torch.tensor(einops.rearrange(pixels, "b h w c -> b c h w")))
    first = spatial[0][:, : network.SPATIAL_CHANNELS]
    return [x.numpy() for x in (pool, einops.rearrange(first, "b c h w -> b (h w c)"), logits)]


@pytest.mark.slow
@pytest.mark.parametrize("size", [(64, 48), (384, 320)], ids=["enlarged", "reduced"])
def test_features_equal_the_port(size, tmp_path, stub_torchvision):
    coarse = np.random.default_rng(1).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    pixels = coarse.repeat(size[0] // 4, axis=1).repeat(size[1] // 4, axis=2)
    state_dict = scaled_state_dict()
    expected = port_features(state_dict, tmp_path / "port.pth", pixels)
    model = FunctionalModel(Inception, InceptionConfig())
    params = inception.from_reference(state_dict, model.config, model.abstract_params())
    found = jax.jit(lambda params, pixels: model.bind(params)(pixels))(params, pixels)
    assert [x.shape for x in found] == [(2, 2048), (2, 2023), (2, 1008)]
    for ours, theirs in zip(found, expected, strict=True):
        assert np.std(theirs[0] - theirs[1]) > 1000 * TOLERANCE, "both images look the same"
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def reference_resize(image, size):
    """One image [H, W], position by position."""
    height, width = image.shape
    result = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            y, x = i * height / size, j * width / size
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = image[top, left] * (1 - x + left) + image[top, right] * (x - left)
            lower = image[bottom, left] * (1 - x + left) + image[bottom, right] * (x - left)
            result[i, j] = upper * (1 - y + top) + lower * (y - top)
    return result


@pytest.mark.parametrize("size_in", [(7, 5), (23, 29)])
def test_resize_samples_at_corners_of_pixels(size_in):
    image = np.random.default_rng(0).uniform(0, 255, (1, *size_in, 1)).astype(np.float32)
    found = resize_bilinear(jnp.asarray(image), 13)[0, ..., 0]
    np.testing.assert_allclose(
        found, reference_resize(image[0, ..., 0], 13), atol=255 * RESIZE_TOLERANCE
    )
    assert found[0, 0] == image[0, 0, 0, 0]


def test_average_pooling_leaves_out_the_padding():
    ones = jnp.ones((1, 4, 4, 1))
    np.testing.assert_allclose(network.POOLS["average"](ones), ones, rtol=1e-6)


def test_conversion_table_covers_the_published_names():
    like = FunctionalModel(Inception, InceptionConfig()).abstract_params()
    shapes = rules.reference_shapes(inception.table(InceptionConfig()), like)
    assert len(shapes) == 5 * NUM_CONVS + 1
    assert shapes["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
    assert shapes["Mixed_6d.branch7x7dbl_4.conv.weight"] == (160, 160, 7, 1)
    assert shapes["Mixed_7c.branch3x3dbl_3b.conv.weight"] == (384, 384, 3, 1)
    assert shapes["Mixed_7a.branch3x3_1.bn.running_var"] == (192,)
    assert shapes["fc.weight"] == (1008, 2048)


def test_classifier_of_imagenet_is_refused():
    config = dataclasses.replace(InceptionConfig(), blocks=(), spatial_block="")
    like = FunctionalModel(Inception, config).abstract_params()
    shapes = rules.reference_shapes(inception.table(config), like)
    state_dict = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    state_dict |= {"Conv2d_1a_3x3.bn.num_batches_tracked": np.zeros(()), "fc.bias": np.zeros(1008)}
    inception.from_reference(state_dict, config, like)
    state_dict["fc.weight"] = np.zeros((1000, 192), np.float32)
    with pytest.raises(ValueError, match=r"fc\.weight has \(1000, 192\), expected \(1008, 192\)"):
        inception.from_reference(state_dict, config, like)
