"""Architectures of a tokenizer and an autoencoder that are used without weights.

They are read from a model directory; where it does not exist yet, the released one's is taken.
"""

from typing import TypeVar

from absl import logging

from dar_jax.common import model_dir
from dar_jax.common.config_build import build
from dar_jax.models.dar.tokenizer import TokenizerConfig
from dar_jax.models.kl_vae import KlVaeConfig

RELEASED_TOKENIZER = TokenizerConfig(tokens_per_step=32)
RELEASED_VAE = KlVaeConfig()
T = TypeVar("T")


def tokenizer_config(directory: str) -> TokenizerConfig:
    """Return the architecture of a D-AR tokenizer.

    Raises:
        ValueError: the directory holds something else.
    """
    return _read(directory, "dar_tokenizer", RELEASED_TOKENIZER)


def vae_config(directory: str) -> KlVaeConfig:
    """Return the architecture of a KL autoencoder.

    Raises:
        ValueError: the directory holds something else.
    """
    return _read(directory, "kl_vae", RELEASED_VAE)


def _read(directory: str, kind: str, released: T) -> T:
    located = model_dir.locate(directory)
    if not located.exists():
        logging.info("%s does not exist: taking the released %s", directory, kind)
        return released
    loaded = model_dir.load_config(located, kind)
    return build(type(released), loaded["model"], str(located))
