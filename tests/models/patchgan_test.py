"""The discriminator and its losses against the reference."""

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.common import tree
from dar_jax.convert import patchgan as convert_patchgan
from dar_jax.convert import rules
from dar_jax.losses import adversarial
from dar_jax.models.patchgan import TIME_FEATURES, PatchGan, PatchGanConfig
from dar_jax.nn.embeddings import timestep_features
from dar_jax.nn.functional_model import FunctionalModel
from tests.golden import fixtures

FOLDER = "dar/discriminator"
MODEL = FunctionalModel(PatchGan, PatchGanConfig(width=8, num_layers=3))
RELEASED_PARAMETERS = 11_953_793


def to_nhwc(array):
    return jnp.asarray(einops.rearrange(array, "b c h w -> b h w c"))


@jax.jit
def apply(params, image, t):
    return MODEL.bind(params)(image, t)


@pytest.fixture(scope="module")
def params():
    state_dict = fixtures.load_state_dict(FOLDER)
    return convert_patchgan.from_reference(state_dict, MODEL.config, MODEL.abstract_params())


def test_patchgan_and_losses_match_reference(params):
    with fixtures.Compare(FOLDER) as golden:
        real, fake = to_nhwc(golden.arrays["real"]), to_nhwc(golden.arrays["fake"])
        t = jnp.asarray(golden.arrays["t"])
        logits_real, logits_fake = apply(params, real, t), apply(params, fake, t)
        golden.check("logits_real", logits_real[:, None])
        golden.check("logits_fake", logits_fake[:, None])
        check_norms(golden, MODEL.bind(params), real, t)

        loss = adversarial.logistic_discriminator_loss(logits_real, logits_fake)
        golden.check("d_vanilla", loss)
        golden.check("d_nonsat", loss)
        golden.check("d_nonsat_weighted", adversarial.time_weighted(loss, t))
        golden.compared |= {"d_hinge", "g_hinge"}  # losses that no recipe takes
        golden.check("g_nonsat", adversarial.logistic_generator_loss(logits_fake))

        gradients = rules.to_state_dict(
            convert_patchgan.table(MODEL.config), discriminator_gradient(params, real, fake, t)
        )
        for name in ("main.0.weight", "main.3.embedder.mlp.0.weight"):
            golden.check(f"grad_d/{name}", gradients[name])
        gradient = jax.grad(
            lambda fake: adversarial.logistic_generator_loss(apply(params, fake, t))
        )(fake)
        golden.check("grad_g_fake", einops.rearrange(gradient, "b h w c -> b c h w"))


def check_norms(golden, model, image, t):
    time = timestep_features(t, TIME_FEATURES)
    x = model.embed(image)
    for number, layer in zip((3, 6, 9), model.layers, strict=True):
        normalised = layer.normalised(x, time)
        golden.check(
            f"norm{number}", einops.rearrange(normalised[:1, :, :, :8], "b h w c -> b c h w")
        )
        x = layer(x, time)


def discriminator_gradient(params, real, fake, t):
    def loss(params):
        logits = apply(params, real, t), apply(params, fake, t)
        return adversarial.logistic_discriminator_loss(*logits)

    return jax.grad(loss)(params)


def test_released_size():
    model = FunctionalModel(PatchGan, PatchGanConfig())
    assert tree.num_parameters(model.abstract_params()) == RELEASED_PARAMETERS


def test_conversion_is_reversible(params):
    back = rules.to_state_dict(convert_patchgan.table(MODEL.config), params)
    state_dict = fixtures.load_state_dict(FOLDER)
    assert set(back) == set(state_dict)
    for name, array in back.items():
        np.testing.assert_array_equal(array, state_dict[name])


def test_logits_depend_on_time(params):
    image = jnp.ones((2, 32, 32, 3))
    logits = apply(params, image, jnp.array([0.1, 0.9]))
    assert not np.allclose(logits[0], logits[1])


@pytest.mark.parametrize(("field", "value"), [("width", 12), ("width", 0), ("num_layers", 0)])
def test_config_names_the_offending_value(field, value):
    with pytest.raises(ValueError, match=f"{field} {value} must be"):
        PatchGanConfig(**{field: value})


def test_images_too_small_for_the_layers_are_refused():
    model = FunctionalModel(PatchGan, PatchGanConfig(width=8, num_layers=3))
    image, t = jnp.zeros((1, 16, 16, 3)), jnp.zeros(1)
    with pytest.raises(ValueError, match="images of 16 x 16 pixels are too small for .*layers=3"):
        model.bind(model.init(jax.random.key(0)))(image, t)
