"""LPIPS against the reference, and its behaviour where the reference has none."""

import functools

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.convert import lpips as convert_lpips
from dar_jax.convert import rules
from dar_jax.losses.perceptual import level_distances, perceptual_distance
from dar_jax.models.frozen.lpips import NETWORKS, Lpips, LpipsConfig
from dar_jax.nn.functional_model import FunctionalModel
from tests.golden import fixtures

FOLDER = "dar/lpips"
MODEL = FunctionalModel(Lpips, LpipsConfig())
ROUNDING = 1e-9  # the two feature passes may be fused differently; distances are about 0.05


def to_nhwc(array):
    return jnp.asarray(einops.rearrange(array, "b c h w -> b h w c"))


def to_nchw(array):
    return einops.rearrange(array, "b h w c -> b c h w")


@pytest.fixture(scope="module")
def params():
    like = MODEL.abstract_params()
    return convert_lpips.from_reference(fixtures.load_state_dict(FOLDER), MODEL.config, like)


@jax.jit
def compare(params, a, b):
    """Features, contribution of each level, distance."""
    model = MODEL.bind(params)
    features = model.features(a), model.features(b), model.weights()
    return features, level_distances(*features), perceptual_distance(*features)


@jax.jit
def value_and_gradient(params, a, b):
    return jax.value_and_grad(lambda b: jnp.mean(compare(params, a, b)[2]))(b)


def test_lpips_matches_reference(params):
    with fixtures.Compare(FOLDER) as golden:
        x, y = to_nhwc(golden.arrays["x"]), to_nhwc(golden.arrays["y"])
        (features, _, _), levels, distance = compare(params, x, y)
        for i, feature in enumerate(features):
            golden.check(f"feat{i}_mean", jnp.mean(feature, axis=(1, 2)))
            golden.check(f"feat{i}_corner", to_nchw(feature[:, :3, :3, :8]))
        for i, level in enumerate(levels):
            golden.check(f"level{i}", level[:, None, None, None])
        golden.check("lpips", distance[:, None, None, None])
        golden.check("grad_y", to_nchw(value_and_gradient(params, x, y)[1]))


def test_lpips_of_equal_images_is_zero_with_finite_gradient(params):
    image = jax.random.uniform(jax.random.key(0), (2, 32, 48, 3), minval=-1.0)
    value, gradient = value_and_gradient(params, image, image)
    np.testing.assert_allclose(value, 0.0, atol=ROUNDING)
    np.testing.assert_allclose(gradient, 0.0, atol=ROUNDING)


def test_distance_of_vanished_features_has_finite_gradient():
    zeros, ones = (jnp.zeros((1, 2, 2, 3)),), (jnp.ones((1, 2, 2, 3)),)
    weights = (jnp.ones(3),)
    value, gradient = jax.value_and_grad(lambda a: jnp.sum(perceptual_distance(a, ones, weights)))(
        zeros
    )
    assert value == pytest.approx(1.0)
    assert np.all(np.isfinite(gradient[0]))


def test_conversion_is_reversible(params):
    state_dict = fixtures.load_state_dict(FOLDER)
    back = rules.to_state_dict(convert_lpips.table(MODEL.config), params)
    assert set(state_dict) - set(back) == set(convert_lpips.CONSTANTS)
    for name, array in back.items():
        np.testing.assert_array_equal(array, state_dict[name])


def test_conversion_rejects_other_input_scaling():
    state_dict = fixtures.load_state_dict(FOLDER)
    state_dict["scaling_layer.shift"] = np.zeros((1, 3, 1, 1))
    with pytest.raises(ValueError, match=r"scaling_layer\.shift is \[0\.0, 0\.0, 0\.0\]"):
        convert_lpips.from_reference(state_dict, MODEL.config, {})


@pytest.mark.parametrize(("network", "least"), [("alexnet", 31), ("vgg16", 16)])
def test_images_too_small_for_the_network_are_refused(network, least):
    model = FunctionalModel(Lpips, NETWORKS[network])
    features = functools.partial(
        jax.eval_shape, lambda params, image: model.bind(params).features(image)
    )
    params = model.abstract_params()
    maps = features(params, jax.ShapeDtypeStruct((1, least, least, 3), jnp.float32))
    assert all(0 not in each.shape for each in maps)
    with pytest.raises(ValueError, match=f"images of {least - 1} x {least} pixels are too small"):
        features(params, jax.ShapeDtypeStruct((1, least - 1, least, 3), jnp.float32))
