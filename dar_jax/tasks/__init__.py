"""Tasks by name."""

import dataclasses
from typing import Any, TypeVar

import ml_collections

from dar_jax.common.config_build import build as build_config
from dar_jax.data import codes, encoded, latents
from dar_jax.data.sources import DataConfig, load_source
from dar_jax.models.dar.llama import LlamaConfig
from dar_jax.models.dar.tokenizer import TokenizerConfig
from dar_jax.models.kl_vae import KlVaeConfig
from dar_jax.models.transdiff.model import TransDiffConfig
from dar_jax.nn.compute import Compute
from dar_jax.tasks.base import Task
from dar_jax.tasks.dar_prior import DarPriorTask
from dar_jax.tasks.dar_tokenizer import DarTokenizerTask, TokenizerLossConfig
from dar_jax.tasks.kl_vae import KlVaeLossConfig, KlVaeTask
from dar_jax.tasks.transdiff import TransDiffLossConfig, TransDiffTask

T = TypeVar("T")

LATENT_SOURCES = ("latents", "latent_folder")
TASKS = ("dar_tokenizer", "dar_prior", "kl_vae", "transdiff")


def build(
    config: ml_collections.ConfigDict,
    *,
    shape_of_tokenizer: TokenizerConfig | None = None,
    shape_of_vae: KlVaeConfig | None = None,
) -> Task:
    """Build the task that `config.task` names from its blocks.

    Args:
        config: the configuration.
        shape_of_tokenizer: see `DarPriorTask`; other tasks need none.
        shape_of_vae: see `TransDiffTask`; other tasks need none.

    Raises:
        ValueError: an unknown task, a block that it refuses, or codes of another tokenizer.
    """
    match config.task:
        case "dar_tokenizer":
            return _dar_tokenizer(config)
        case "dar_prior":
            return _dar_prior(config, shape_of_tokenizer)
        case "kl_vae":
            loss = _block(KlVaeLossConfig, config, "loss")
            model, compute = _block(KlVaeConfig, config, "model"), _compute(config)
            return KlVaeTask(model, loss, compute, image_size=config.data.image_size)
        case "transdiff":
            return _transdiff(config, shape_of_vae)
        case _:
            raise ValueError(f"config.task={config.task!r} must be one of {', '.join(TASKS)}")


def _dar_tokenizer(config: ml_collections.ConfigDict) -> DarTokenizerTask:
    model = _block(TokenizerConfig, config, "model")
    if model.image_size != config.data.image_size:
        raise ValueError(
            f"config.data.image_size={config.data.image_size} must equal "
            f"config.model.image_size={model.image_size}"
        )
    return DarTokenizerTask(model, _block(TokenizerLossConfig, config, "loss"), _compute(config))


def _dar_prior(
    config: ml_collections.ConfigDict, shape_of_tokenizer: TokenizerConfig | None
) -> DarPriorTask:
    model = _with_classes(_block(LlamaConfig, config, "model"), config)
    from_codes = config.data.source == "codes"
    if from_codes and shape_of_tokenizer is None:
        encoded.check_model(config.data.path, codes.FORM, config.tokenizer)
    return DarPriorTask(
        model,
        config.tokenizer,
        _compute(config),
        shape_of_tokenizer=shape_of_tokenizer,
        from_codes=from_codes,
    )


def _transdiff(
    config: ml_collections.ConfigDict, shape_of_vae: KlVaeConfig | None
) -> TransDiffTask:
    model = _with_classes(_block(TransDiffConfig, config, "model"), config)
    from_moments = config.data.source in LATENT_SOURCES
    if from_moments and shape_of_vae is None:
        shape = (model.latent_size, model.latent_size, 2 * model.channels)
        latents.check_latents(_block(DataConfig, config, "data"), config.vae, shape)
    return TransDiffTask(
        model,
        _block(TransDiffLossConfig, config, "loss"),
        config.vae,
        _compute(config),
        image_size=config.data.image_size,
        shape_of_vae=shape_of_vae,
        from_moments=from_moments,
    )


def _block(block_class: type[T], config: ml_collections.ConfigDict, name: str) -> T:
    return build_config(block_class, config[name].to_dict(), f"config.{name}")


def _compute(config: ml_collections.ConfigDict) -> Compute:
    return _block(Compute, config, "compute")


def _with_classes(model: Any, config: ml_collections.ConfigDict) -> Any:
    """Take the number of classes from the data where the config leaves it open."""
    if model.num_classes:
        return model
    source = load_source(_block(DataConfig, config, "data"), "train")
    return dataclasses.replace(model, num_classes=source.num_classes)
