"""The KL autoencoder against the reference, and its behaviour where the reference has none."""

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.common import image as images
from dar_jax.common.tree import num_parameters
from dar_jax.models.kl_vae import LATENT_SCALE, KlVae, KlVaeConfig, posterior
from dar_jax.nn.functional_model import FunctionalModel
from tests.golden import fixtures, models

TINY, GROUPS = "transdiff/kl_vae_tiny", "transdiff/kl_vae_groups32"
TOTAL, ENCODER, DECODER = 66_456_019, 28_265_760, 38_188_931
"""Parameters of the released VAE."""
ROUNDING = 1e-5  # float32 images near 5, in other batches
SMALL = KlVaeConfig(
    width=8, width_factors=(1, 2), attention_levels=(1,), latent_channels=2, num_groups=4
)


def to_nhwc(array):
    return jnp.asarray(einops.rearrange(array, "b c h w -> b h w c"))


def to_nchw(array):
    return einops.rearrange(array, "b h w c -> b c h w")


def check_pass(golden, model, params):
    """Compare encoding, the posterior and decoding."""
    arrays = golden.arrays
    encode = jax.jit(lambda params, image: model.bind(params).encode(image))
    decode = jax.jit(lambda params, latent: model.bind(params).decode(latent))
    moments = encode(params, to_nhwc(arrays["image"]))
    gaussian = posterior(moments)
    sample = gaussian.sample(to_nhwc(arrays["sample_noise"]))
    latent = model.config.latent_scale * sample
    reconstruction = decode(params, latent / model.config.latent_scale)
    golden.check("moments", to_nchw(moments))
    golden.check("mode", to_nchw(gaussian.mode()))
    golden.check("std", to_nchw(gaussian.std()))
    golden.check("sample", to_nchw(sample))
    golden.check("latent", to_nchw(latent))
    golden.check("decoded", to_nchw(decode(params, to_nhwc(arrays["z"]))))
    golden.check("reconstruction", to_nchw(reconstruction))
    golden.check("image_uint8", images.to_pixels(reconstruction))
    return gaussian


def test_vae_matches_reference():
    model, params = models.kl_vae(TINY)
    assert model.config.latent_scale == LATENT_SCALE
    with fixtures.Compare(TINY) as golden:
        gaussian = check_pass(golden, model, params)
        golden.check("kl", gaussian.kl())
        clamped = posterior(to_nhwc(golden.arrays["clamp_moments"]))
        golden.check("clamp_logvar", to_nchw(clamped.log_variance))
        golden.check("clamp_std", to_nchw(clamped.std()))
        golden.check("clamp_var", to_nchw(clamped.std() ** 2))
        golden.check_all(**stages(model, params, golden.arrays))


def stages(model, params, arrays):
    """Outputs of the first residual block and of the attention in the middle of both halves."""

    @jax.jit
    def run(params, image, latent):
        vae = model.bind(params)
        first = vae.encoder.levels[0].residuals[0](vae.encoder.stem(image))
        lowest = (vae.encoder.descend(image), vae.decoder.stem(vae.from_latent(latent)))
        middles = (vae.encoder.middle, vae.decoder.middle)
        attended = [m.attention(m.first(x)) for m, x in zip(middles, lowest, strict=True)]
        return first[:1, ::8, ::8], *attended

    found = run(params, to_nhwc(arrays["image"]), to_nhwc(arrays["z"]))
    names = ("enc_block0_b0", "enc_mid_attn", "dec_mid_attn")
    return dict(zip(names, map(to_nchw, found), strict=True))


@pytest.mark.slow
def test_vae_of_many_groups_matches_reference_on_images_that_are_not_square():
    model, params = models.kl_vae(GROUPS)
    with fixtures.Compare(GROUPS) as golden:
        check_pass(golden, model, params)


def test_released_vae_has_the_published_size():
    params = FunctionalModel(KlVae, KlVaeConfig()).abstract_params()
    counts = [num_parameters(part) for part in (params, params["encoder"], params["decoder"])]
    assert counts == [TOTAL, ENCODER, DECODER]


def test_decoding_in_slices_changes_nothing():
    model = FunctionalModel(KlVae, SMALL)
    params = model.init(jax.random.key(0))
    latent = jax.random.normal(jax.random.key(1), (4, 3, 2, 2))
    whole, sliced = (
        jax.jit(lambda params, latent, n=n: model.bind(params).decode(latent, microbatch=n))(
            params, latent
        )
        for n in (None, 2)
    )
    assert whole.shape == (4, 6, 4, 3) and jnp.std(whole) > 0.01
    np.testing.assert_allclose(sliced, whole, atol=ROUNDING)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 6}, r"\(6, 12\) must be multiples of num_groups=4"),
        ({"attention_levels": (2,)}, r"attention_levels \(2,\) must be levels in 0..1"),
        ({"width_factors": ()}, "width_factors is empty"),
        ({"latent_scale": 0.0}, "latent_scale 0.0 is not positive"),
    ],
)
def test_config_refuses(changes, message):
    sizes = {"width": 8, "width_factors": (1, 2), "attention_levels": (), "num_groups": 4}
    with pytest.raises(ValueError, match=message):
        KlVaeConfig(**{**sizes, **changes})


def test_image_that_the_stride_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="24x40 pixels: both sides must be multiples of .* 16"):
        KlVaeConfig().latent_grid(24, 40)
