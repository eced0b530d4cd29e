"""Precision of products on accelerators, whose default for float32 is less than that."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from dar_jax.caching import codes, latents
from dar_jax.models.dar import sampler
from dar_jax.models.kl_vae import KlVae, KlVaeConfig
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.pipelines import dar, kl_vae
from tests.golden import models

TOKENIZER, _ = models.tokenizer("dar/tokenizer_tiny")
VAE = FunctionalModel(
    KlVae,
    KlVaeConfig(
        width=8, width_factors=(1, 2), num_groups=4, latent_channels=4, attention_levels=()
    ),
)
IMAGES = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
PIXELS = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.uint8)
INDICES = jax.ShapeDtypeStruct((1, TOKENIZER.config.num_tokens), jnp.int32)
LATENTS = jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32)


def precisions(function, model, *arguments):
    """Precision of every product and convolution, where the default is the least there is."""
    with jax.default_matmul_precision("bfloat16"):
        lowered = jax.jit(functools.partial(function, model)).lower(
            model.abstract_params(), *arguments
        )
    operations = re.findall(r"stablehlo\.(?:dot_general|convolution)[^\n]*", lowered.as_text())
    return {re.search(r"HIGHEST|HIGH|DEFAULT", line)[0] for line in operations}


@pytest.mark.parametrize(
    ("encode", "model", "images"),
    [
        (dar._encode, TOKENIZER, IMAGES),
        (codes._encode, TOKENIZER, PIXELS),
        (kl_vae._encode, VAE, IMAGES),
        (latents._encode, VAE, PIXELS),
    ],
    ids=["codes", "cached codes", "latents", "cached latents"],
)
def test_encoding_is_in_full_float32(encode, model, images):
    assert precisions(encode, model, images) == {"HIGHEST"}


def test_decoding_in_float32_is_no_less_than_tf32():
    assert precisions(sampler.decode_indices, TOKENIZER, INDICES, IMAGES) == {"HIGH"}
    decode = functools.partial(kl_vae._decode, microbatch=None)
    assert precisions(decode, VAE, LATENTS) == {"HIGH"}
