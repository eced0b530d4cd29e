"""Image conversion, DINOv2 input and alignment loss against the reference's `loss_pieces`."""

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.common.image import resize_bicubic, to_pixels
from dar_jax.losses.alignment import alignment_loss, cosine_similarity
from dar_jax.models.frozen import dinov2
from tests.golden import fixtures

FOLDER = "dar/loss_pieces"


def to_nhwc(array):
    return jnp.asarray(einops.rearrange(array, "b c h w -> b h w c"))


def to_nchw(array):
    return einops.rearrange(array, "b h w c -> b c h w")


def test_loss_pieces_match_reference():
    with fixtures.Compare(FOLDER) as golden:
        image = to_nhwc(golden.arrays["img64"])
        small = to_nchw(dinov2.preprocess(image))
        golden.check("dino_from64", small[:, :, ::7, ::7])
        golden.check("dino_from64_edge", small[:, :, :4, -12:])
        large = fixtures.make(41, "input/img256", (1, 3, 256, 256), scale=0.5)
        shrunk = to_nchw(dinov2.preprocess(to_nhwc(np.clip(large, -1, 1))))
        golden.check("dino_from256", shrunk[:, :, ::7, ::7])
        golden.check("dino_from256_edge", shrunk[:, :, -5:, :12])
        golden.check("bicubic_32x32", to_nchw(resize_bicubic(image, (32, 32))))
        golden.check("bicubic_24x40", to_nchw(resize_bicubic(image, (24, 40))))

        a, b = jnp.asarray(golden.arrays["feat_a"]), jnp.asarray(golden.arrays["feat_b"])
        golden.check("cosine", cosine_similarity(a, b))
        loss, gradient = jax.value_and_grad(alignment_loss, argnums=1)(a, b)
        golden.check("cosine_loss", loss)
        golden.check("cosine_grad", gradient[:, 1:])

        golden.check("uint8_out", to_pixels(jnp.asarray(golden.arrays["uint8_in"])))


def test_alignment_is_scale_free_and_bounded():
    a = jax.random.normal(jax.random.key(0), (2, 5, 8))
    assert alignment_loss(a, 3.0 * a) == pytest.approx(0.0, abs=1e-6)
    assert alignment_loss(a, -a) == pytest.approx(2.0, abs=1e-6)


def test_alignment_sends_no_gradient_to_the_target():
    a, b = jax.random.normal(jax.random.key(0), (2, 3, 4, 8))
    gradient = jax.grad(alignment_loss)(a, b)
    np.testing.assert_array_equal(gradient, 0.0)


def test_alignment_with_zero_vectors_is_finite():
    zeros = jnp.zeros((1, 2, 8))
    value, gradient = jax.value_and_grad(alignment_loss, argnums=1)(zeros, zeros)
    assert value == 1.0
    assert np.all(np.isfinite(gradient))
