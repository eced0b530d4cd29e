"""The models of the golden folders: our architecture with the recipe's weights."""

import functools
from typing import Any

import jax

from dar_jax.common.typing import Params
from dar_jax.convert import dar as convert
from dar_jax.convert import kl_vae as convert_kl_vae
from dar_jax.convert import transdiff as convert_transdiff
from dar_jax.convert.rules import to_params
from dar_jax.models.dar.decoder import FlowDecoder
from dar_jax.models.dar.llama import Llama
from dar_jax.models.dar.tokenizer import Tokenizer
from dar_jax.models.kl_vae import KlVae
from dar_jax.models.transdiff.model import TransDiff
from dar_jax.nn.functional_model import FunctionalModel
from tests.golden import fixtures


@functools.cache
def tokenizer(folder: str) -> tuple[FunctionalModel[Tokenizer], Params]:
    """The tokenizer of a folder and its parameters."""
    config = convert.tokenizer_config(fixtures.load_json(folder, "config"))
    params = convert.tokenizer_params(fixtures.load_state_dict(folder), config)
    return FunctionalModel(Tokenizer, config), jax.device_put(params)


@functools.cache
def prior(folder: str) -> tuple[FunctionalModel[Llama], Params]:
    """The prior of a folder and its parameters."""
    config = convert.prior_config(fixtures.load_json(folder, "config"))
    params = convert.prior_params(fixtures.load_state_dict(folder), config)
    return FunctionalModel(Llama, config), jax.device_put(params)


@functools.cache
def kl_vae(folder: str) -> tuple[FunctionalModel[KlVae], Params]:
    """The VAE of a folder and its parameters."""
    config = convert_kl_vae.architecture(fixtures.load_json(folder, "config"))
    params = convert_kl_vae.params(fixtures.load_state_dict(folder), config)
    return FunctionalModel(KlVae, config), jax.device_put(params)


@functools.cache
def transdiff(folder: str) -> tuple[FunctionalModel[TransDiff], Params]:
    """The TransDiff of a folder and its parameters."""
    config = convert_transdiff.transdiff_config(fixtures.load_json(folder, "config"))
    params = convert_transdiff.transdiff_params(fixtures.load_state_dict(folder), config)
    return FunctionalModel(TransDiff, config), jax.device_put(params)


@functools.cache
def flow_decoder(folder: str) -> tuple[FunctionalModel[FlowDecoder], Params]:
    """The flow decoder of a folder, alone or cut out of its tokenizer, and its parameters."""
    config = fixtures.load_json(folder, "config")
    if "model" in config:
        model, params = tokenizer(folder)
        decoder = with_condition_dim(model.config.condition.dim)
        return FunctionalModel(decoder, model.config.decoder), params["decoder"]
    reference = config["diff_decoder"]
    model = FunctionalModel(
        with_condition_dim(reference["cond_dim"]), convert.flow_decoder_config(reference)
    )
    rules = convert.flow_decoder_rules(model.config)
    params = to_params(rules, fixtures.load_state_dict(folder), model.abstract_params())
    return model, jax.device_put(params)


@functools.cache
def with_condition_dim(condition_dim: int) -> type[FlowDecoder]:
    """`FlowDecoder` with the constructor that `FunctionalModel` calls."""

    class StandAloneDecoder(FlowDecoder):
        def __init__(self, config: Any, **options: Any):
            super().__init__(config, condition_dim=condition_dim, **options)

    return StandAloneDecoder
