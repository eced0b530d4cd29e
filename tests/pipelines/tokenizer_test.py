"""The tokenizer by itself: pictures that are no squares, codes between two pictures'."""

import jax
import numpy as np
import pytest

from dar_jax.common.image import to_float
from dar_jax.kinds.loading import from_pretrained
from dar_jax.pipelines.dar import TokenizerPipeline
from tests import tiny_transdiff
from tests.golden import models

KEPT = 1e-5  # in float32, from noise to data and back
HEIGHT, WIDTH = 32, 48


@pytest.fixture(scope="module")
def tokenizer():
    return TokenizerPipeline(*models.tokenizer("dar/tokenizer_tiny"))


@pytest.fixture(scope="module")
def rectangles():
    return np.random.default_rng(0).integers(0, 256, (2, HEIGHT, WIDTH, 3), dtype=np.uint8)


def test_rectangles_are_encoded_and_decoded(tokenizer, rectangles):
    made = tokenizer.reconstruct(rectangles, rng=jax.random.key(0))
    assert made.images.shape == rectangles.shape
    assert made.indices.shape == (2, tokenizer.config.num_tokens)
    np.testing.assert_array_equal(tokenizer.reconstruct(rectangles, rng=0).images, made.images)
    turned = tokenizer.reconstruct(rectangles.swapaxes(1, 2), rng=0)
    assert turned.images.shape == (2, WIDTH, HEIGHT, 3)
    assert not np.array_equal(made.indices, turned.indices)
    half = tokenizer.encode(rectangles[:, :, : WIDTH // 2])
    assert not np.array_equal(made.indices, half)  # the right half counts


def test_rectangles_are_inpainted(tokenizer, rectangles):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[:, : WIDTH // 3] = True
    noise = np.asarray(jax.random.normal(jax.random.key(1), rectangles.shape))
    known = to_float(rectangles)
    drawn = tokenizer.decode(tokenizer.encode(rectangles), noise=noise, known=known, mask=mask)
    np.testing.assert_allclose(drawn[:, mask], known[:, mask], atol=KEPT)
    free = tokenizer.decode(tokenizer.encode(rectangles), noise=noise)
    assert np.abs(free - drawn)[:, mask].max() > 0.1


def test_sides_that_patches_do_not_fill_are_refused(tokenizer, rectangles):
    with pytest.raises(ValueError, match="44"):
        tokenizer.encode(rectangles[:, :, :44])


def test_codes_between_two_pictures_are_the_nearest_on_the_way(tokenizer):
    ends = np.random.default_rng(1).integers(0, tokenizer.codebook_size, (2, 16)).astype(np.int32)
    between = np.asarray(tokenizer.between(ends, 5))
    np.testing.assert_array_equal(between[[0, -1]], ends)
    codebook = np.asarray(tokenizer.params["quantizer"]["codebook"], np.float64)
    codebook /= np.linalg.norm(codebook, axis=-1, keepdims=True)
    first, last = codebook[ends]
    for index, weight in ((1, 0.25), (3, 0.75)):  # halfway both ends can be as near
        place = (1 - weight) * first + weight * last
        place /= np.linalg.norm(place, axis=-1, keepdims=True)
        np.testing.assert_array_equal(between[index], (place @ codebook.T).argmax(axis=-1))
    np.testing.assert_array_equal(tokenizer.between(ends, 2), ends)


def test_between_refuses(tokenizer):
    ends = np.zeros((2, 16), np.int32)
    for wrong, count, message in (
        (ends, 1, "num_images=1 must be at least 2"),
        (ends[:, :8], 2, "indices hold 8 tokens, expected 16 to 16"),
        (ends + tokenizer.codebook_size, 2, "indices"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizer.between(wrong, count)


def test_latents_have_no_codes_between(tmp_path):
    vae = from_pretrained(tiny_transdiff.save_vae(tmp_path))
    with pytest.raises(ValueError, match="codebook_size=None: it takes codes"):
        vae.between(np.zeros((2, 16), np.int32), 3)
