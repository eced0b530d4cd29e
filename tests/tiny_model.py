"""The smallest prior and tokenizer, of random weights, for tests of what is done with a model."""

import dataclasses
import pathlib

import jax
import numpy as np

from dar_jax.common.model_dir import save_model
from dar_jax.models.dar.decoder import FlowDecoderConfig
from dar_jax.models.dar.encoder import EncoderConfig
from dar_jax.models.dar.llama import Llama, LlamaConfig
from dar_jax.models.dar.tokenizer import ConditionConfig, Tokenizer, TokenizerConfig
from dar_jax.nn.functional_model import FunctionalModel

SIZE, NUM_TOKENS, NUM_CLASSES = 16, 8, 10
TOKENIZER = TokenizerConfig(
    image_size=SIZE,
    num_tokens=NUM_TOKENS,
    num_groups=2,
    num_steps=2,
    codebook_size=32,
    code_dim=4,
    max_tokens=NUM_TOKENS,
    encoder=EncoderConfig(patch_size=8, dim=8, depth=1, head_dim=4),
    condition=ConditionConfig(dim=8, depth=0, head_dim=4),
    decoder=FlowDecoderConfig(patch_size=4, dim=8, depth=1, head_dim=4, feature_layer=None),
)
PRIOR = LlamaConfig(
    num_layers=1,
    num_heads=1,
    dim=8,
    ffn_dim=8,
    vocab_size=32,
    num_tokens=NUM_TOKENS,
    num_classes=NUM_CLASSES,
)


def save(
    directory: pathlib.Path, tokenizer: TokenizerConfig = TOKENIZER, prior: LlamaConfig = PRIOR
) -> pathlib.Path:
    """Write the prior's model directory, its tokenizer in it, and return its path."""
    rng = np.random.default_rng(0)
    for kind, cls, config, companions in (
        ("dar_tokenizer", Tokenizer, tokenizer, {}),
        ("dar_prior", Llama, prior, {"tokenizer": directory / "dar_tokenizer"}),
    ):
        like = FunctionalModel(cls, config).abstract_params()
        params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), like)
        names, config = {"class_names": ["cat", "dog"]}, dataclasses.asdict(config)
        save_model(directory / kind, kind, config, params, names, companions=companions)
    return directory / "dar_prior"
