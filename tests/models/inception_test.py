"""FID's Inception against its PyTorch port, and what holds without it."""

import dataclasses

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.convert import inception, rules
from dar_jax.evaluation.distances import distance
from dar_jax.evaluation.moments import Moments
from dar_jax.models.frozen import inception as network
from dar_jax.models.frozen.inception import Inception, InceptionConfig, resize_bilinear
from dar_jax.nn.functional_model import FunctionalModel

TOLERANCE = 1e-4  # float32 through 94 convolutions; features reach 8
RESIZE_TOLERANCE = 1e-4  # of 255: float32
DISTANCE_TOLERANCE = 1e-6  # float64, but for the root of a product
NUM_CONVS = 94  # of the published network
NUM_COMPARED = 4
"""Features whose distance is compared: more images have covariances of full rank."""


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


def import_pytorch_fid():
    """Its network and its distance; a torchvision that does not fit torch fails in its own way."""
    try:
        from pytorch_fid import fid_score
        from pytorch_fid import inception as port
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"pytorch-fid cannot be imported: {error}")
    return port, fid_score.calculate_frechet_distance


def blocks(count, size):
    """Pictures of 4 x 4 coloured blocks."""
    coarse = np.random.default_rng(1).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(size[0] // 4, axis=1).repeat(size[1] // 4, axis=2)


def our_features(state_dict, pixels, fed_as):
    model = FunctionalModel(Inception, InceptionConfig())
    params = inception.from_reference(state_dict, model.config, model.abstract_params())
    return jax.jit(lambda params, pixels: model.bind(params)(pixels, fed_as))(params, pixels)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(64, 48), (384, 320)], ids=["enlarged", "reduced"])
def test_features_equal_the_port(size, tmp_path, stub_torchvision):
    pixels, state_dict = blocks(2, size), scaled_state_dict()
    expected = port_features(state_dict, tmp_path / "port.pth", pixels)
    found = our_features(state_dict, pixels, "tensorflow")
    assert [x.shape for x in found] == [(2, 2048), (2, 2023), (2, 1008)]
    for ours, theirs in zip(found, expected, strict=True):
        assert np.std(theirs[0] - theirs[1]) > 1000 * TOLERANCE, "both images look the same"
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(64, 48), (384, 320)], ids=["enlarged", "reduced"])
def test_features_and_distance_equal_those_of_pytorch_fid(size, monkeypatch):
    torch = pytest.importorskip("torch")
    module, calculate_frechet_distance = import_pytorch_fid()
    pixels, state_dict = blocks(4 * NUM_COMPARED, size), scaled_state_dict()
    tensors = {name: torch.tensor(array) for name, array in state_dict.items()}
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *_, **__: tensors)
    images = torch.tensor(einops.rearrange(pixels, "b h w c -> b c h w")) / 255
    with torch.no_grad():
        theirs = module.InceptionV3().eval()(images)[0].squeeze((2, 3)).numpy()
    ours = our_features(state_dict, pixels, "pytorch_fid").pool
    assert np.std(theirs[0] - theirs[1]) > 1000 * TOLERANCE, "both images look the same"
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
    few = theirs[:, np.argsort(-theirs.std(axis=0))[:NUM_COMPARED]].astype(np.float64)
    halves = np.split(few, 2)
    gaussians = [x for half in halves for x in (half.mean(axis=0), np.cov(half, rowvar=False))]
    expected = calculate_frechet_distance(*gaussians)
    assert distance(halves[0], Moments.of(halves[1]).gaussian()) == pytest.approx(
        expected, rel=DISTANCE_TOLERANCE
    )


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
    found = resize_bilinear(jnp.asarray(image), 13, half_pixel=False)[0, ..., 0]
    np.testing.assert_allclose(
        found, reference_resize(image[0, ..., 0], 13), atol=255 * RESIZE_TOLERANCE
    )
    assert found[0, 0] == image[0, 0, 0, 0]


@pytest.mark.parametrize("size_in", [(7, 5), (23, 29)])
def test_resize_of_pytorch_samples_at_centres_of_pixels(size_in):
    image = np.random.default_rng(0).uniform(0, 255, (1, *size_in, 1)).astype(np.float32)
    expected = jax.image.resize(image, (1, 13, 13, 1), "linear", antialias=False)
    found = resize_bilinear(jnp.asarray(image), 13, half_pixel=True)
    np.testing.assert_allclose(found, expected, atol=255 * RESIZE_TOLERANCE)


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
