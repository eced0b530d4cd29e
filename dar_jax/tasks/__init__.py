"""Tasks by name."""

import dataclasses
from typing import Any

import ml_collections

from dar_jax.common.config import build as build_config
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
    compute = build_config(Compute, config.compute.to_dict(), "config.compute")
    match config.task:
        case "dar_tokenizer":
            model = build_config(TokenizerConfig, config.model.to_dict(), "config.model")
            if model.image_size != config.data.image_size:
                raise ValueError(
                    f"config.data.image_size={config.data.image_size} must equal "
                    f"config.model.image_size={model.image_size}"
                )
            loss = build_config(TokenizerLossConfig, config.loss.to_dict(), "config.loss")
            return DarTokenizerTask(model, loss, compute)
        case "dar_prior":
            model = _with_classes(
                build_config(LlamaConfig, config.model.to_dict(), "config.model"), config
            )
            from_codes = config.data.source == "codes"
            if from_codes and shape_of_tokenizer is None:
                encoded.check_model(config.data.path, codes.FORM, config.tokenizer)
            return DarPriorTask(
                model,
                config.tokenizer,
                compute,
                shape_of_tokenizer=shape_of_tokenizer,
                from_codes=from_codes,
            )
        case "kl_vae":
            model = build_config(KlVaeConfig, config.model.to_dict(), "config.model")
            loss = build_config(KlVaeLossConfig, config.loss.to_dict(), "config.loss")
            return KlVaeTask(model, loss, compute, image_size=config.data.image_size)
        case "transdiff":
            model = _with_classes(
                build_config(TransDiffConfig, config.model.to_dict(), "config.model"), config
            )
            from_moments = config.data.source in LATENT_SOURCES
            if from_moments and shape_of_vae is None:
                data = build_config(DataConfig, config.data.to_dict(), "config.data")
                shape = (model.latent_size, model.latent_size, 2 * model.channels)
                latents.check_latents(data, config.vae, shape)
            return TransDiffTask(
                model,
                build_config(TransDiffLossConfig, config.loss.to_dict(), "config.loss"),
                config.vae,
                compute,
                image_size=config.data.image_size,
                shape_of_vae=shape_of_vae,
                from_moments=from_moments,
            )
        case _:
            raise ValueError(f"config.task={config.task!r} must be one of {', '.join(TASKS)}")


def _with_classes(model: Any, config: ml_collections.ConfigDict) -> Any:
    """Take the number of classes from the data where the config leaves it open."""
    if model.num_classes:
        return model
    data = build_config(DataConfig, config.data.to_dict(), "config.data")
    return dataclasses.replace(model, num_classes=load_source(data, "train").num_classes)
