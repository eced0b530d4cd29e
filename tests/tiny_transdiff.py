"""The smallest TransDiff models and their autoencoder, of random weights."""

import dataclasses
import pathlib

import jax

from dar_jax.common.model_dir import save_model
from dar_jax.models.kl_vae import KlVae, KlVaeConfig
from dar_jax.models.transdiff.model import TransDiff, TransDiffConfig
from dar_jax.nn.functional_model import FunctionalModel
from tests.random_params import random_params

VAE = KlVaeConfig(
    width=4,
    width_factors=(1, 1),
    num_blocks=1,
    attention_levels=(),
    latent_channels=2,
    num_groups=2,
    latent_scale=0.5,
)
ONE_STEP = TransDiffConfig(
    latent_size=4,
    channels=2,
    num_classes=3,
    condition_tokens=16,
    buffer_size=2,
    dim=16,
    num_heads=2,
    encoder_depth=2,
    decoder_depth=2,
    attention_dropout=0.0,
    dropout=0.0,
)
MRAR = dataclasses.replace(ONE_STEP, num_references=4, reference_patch_size=2)
LARGE = dataclasses.replace(ONE_STEP, latent_size=8)


def save_vae(directory: pathlib.Path) -> pathlib.Path:
    """Write the autoencoder's model directory and return its path."""
    params = random_params(FunctionalModel(KlVae, VAE).abstract_params())
    save_model(directory / "vae", "kl_vae", dataclasses.asdict(VAE), params, {})
    return directory / "vae"


def save(directory: pathlib.Path, name: str, config: TransDiffConfig) -> pathlib.Path:
    """Write a model directory beside that of `save_vae`, the latter in it, and return its path."""
    params = random_params(FunctionalModel(TransDiff, config).abstract_params())
    params = jax.tree.map(lambda leaf: 0.5 * leaf, params)
    extra, values = {"class_names": ["cat", "dog", "fox"]}, dataclasses.asdict(config)
    companions = {"vae": directory / "vae"}
    save_model(directory / name, "transdiff", values, params, extra, companions=companions)
    return directory / name
