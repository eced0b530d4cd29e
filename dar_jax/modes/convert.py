"""`--mode=convert`: an official checkpoint to a model directory, or a model directory back."""

import dataclasses
import fnmatch
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ml_collections
import safetensors
from absl import logging

from dar_jax.common import model_dir
from dar_jax.common.config_build import build
from dar_jax.common.files import write_safetensors
from dar_jax.common.tree import num_parameters
from dar_jax.common.typing import Params
from dar_jax.convert import dar, frozen, kl_vae, transdiff
from dar_jax.convert.checkpoints import Checkpoint, read_checkpoint
from dar_jax.models.dar.llama import Llama, LlamaConfig
from dar_jax.models.dar.sampler import check_pair
from dar_jax.models.dar.tokenizer import Tokenizer, TokenizerConfig
from dar_jax.models.kl_vae import KlVae, KlVaeConfig
from dar_jax.models.transdiff.model import TransDiff, TransDiffConfig
from dar_jax.models.transdiff.sampler import check_vae
from dar_jax.nn.functional_model import FunctionalModel

DIRECTIONS = ("jax", "torch")
MAX_LISTED = 5
MODELS = {
    "dar_tokenizer": (Tokenizer, TokenizerConfig, dar.tokenizer_state_dict),
    "dar_prior": (Llama, LlamaConfig, dar.prior_state_dict),
    "kl_vae": (KlVae, KlVaeConfig, kl_vae.state_dict),
    "transdiff": (TransDiff, TransDiffConfig, transdiff.transdiff_state_dict),
}
"""Module, its config, and what turns parameters into the reference's state dict, by kind."""


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """What is converted.

    Attributes:
        source: an official checkpoint, `.pt`, `.pth`, `.ckpt` or `.safetensors`, as a path or
            `hf://owner/name/file`; towards torch a model directory, where empty is WORKDIR/model.
        to: "jax" writes the model directory WORKDIR/model, "torch" writes WORKDIR/KIND.safetensors
            under the reference's names.
        net: towards jax, a frozen network of losses or evaluation instead of config.task: one of
            `frozen.NETS`, which says what `source` is then.
    """

    source: str = ""
    to: str = "jax"
    net: str = ""

    def __post_init__(self):
        if self.net not in ("", *frozen.NETS):
            raise ValueError(f"net={self.net!r} must be one of {', '.join(frozen.NETS)}")
        if self.to not in DIRECTIONS:
            raise ValueError(f"to={self.to!r} must be one of {', '.join(DIRECTIONS)}")


def convert(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Convert `config.convert.source`; nothing is written unless all of it fits.

    Raises:
        ValueError: the source cannot be read or does not fit the model, or the workdir cannot be
            written.
    """
    settings = build(ConvertConfig, config.convert.to_dict(), "config.convert")
    if settings.net:
        frozen_to_jax(settings.net, settings.source, pathlib.Path(workdir))
    elif settings.to == "torch":
        to_torch(settings.source or workdir, pathlib.Path(workdir))
    else:
        to_jax(settings.source, config, pathlib.Path(workdir))


def to_jax(source: str, config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Write the model directory of an official checkpoint."""
    if not source:
        raise ValueError("config.convert.source is empty: name a path or hf://owner/name/file")
    checkpoint = read_checkpoint(source)
    companions = {}
    match config.task:
        case "dar_tokenizer":
            with _errors_name(source):
                model, params = _tokenizer(checkpoint, config)
            _report(checkpoint, dar.UNUSED_TOKENIZER_KEYS)
        case "dar_prior":
            model = build(LlamaConfig, config.model.to_dict(), "config.model")
            with _errors_name(source):
                params = dar.prior_params(checkpoint.state_dict, model)
            _report(checkpoint, dar.UNUSED_PRIOR_KEYS)
            fits = functools.partial(check_pair, model)
            companions = _companion(
                config.tokenizer, model_dir.TOKENIZER_NAME, "dar_tokenizer", fits
            )
        case "kl_vae":
            model = build(KlVaeConfig, config.model.to_dict(), "config.model")
            with _errors_name(source):
                params = kl_vae.params(checkpoint.state_dict, model)
            _report(checkpoint, kl_vae.unused_keys(checkpoint.state_dict))
        case "transdiff":
            model = build(TransDiffConfig, config.model.to_dict(), "config.model")
            with _errors_name(source):
                params = transdiff.transdiff_params(checkpoint.state_dict, model)
            _report(checkpoint, ())
            fits = functools.partial(check_vae, model)
            companions = _companion(config.vae, model_dir.VAE_NAME, "kl_vae", fits)
        case _:
            raise ValueError(f"config.task={config.task!r} has no official checkpoints")
    directory = workdir / model_dir.WORKDIR_NAME
    with _writing(directory):
        model_dir.save_model(
            directory, config.task, dataclasses.asdict(model), params, {}, companions=companions
        )
    logging.info("Wrote %s with %d parameters", directory, num_parameters(params))


def frozen_to_jax(net: str, source: str, workdir: pathlib.Path) -> None:
    """Write the model directory of a frozen network of losses or evaluation."""
    if not source:
        raise ValueError("config.convert.source is empty: name a path or hf://owner/name/file")
    state_dict = {}
    for part in source.split(","):
        state_dict |= read_checkpoint(part).state_dict
    with _errors_name(source):
        kind, model, params = frozen.from_reference(net, state_dict)
    directory = workdir / model_dir.WORKDIR_NAME
    with _writing(directory):
        model_dir.save_model(directory, kind, model, params, {})
    logging.info("Wrote %s with %d parameters", directory, num_parameters(params))


def to_torch(source: str, workdir: pathlib.Path) -> None:
    """Write a model directory as a state dict under the reference's names."""
    directory = model_dir.locate(source)
    loaded = model_dir.load_config(directory)
    if loaded["kind"] not in MODELS:
        raise ValueError(f"{directory}: {loaded['kind']!r} has no counterpart in the reference")
    cls, config_class, to_state_dict = MODELS[loaded["kind"]]
    model = build(config_class, loaded["model"], str(directory))
    like = FunctionalModel(cls, model).abstract_params()
    state_dict = to_state_dict(model_dir.load_params(directory, like), model)
    path = workdir / f"{loaded['kind']}.safetensors"
    with _writing(path):
        write_safetensors(path, state_dict, {"format": "pt"})
    logging.info("Wrote %s with %d tensors", path, len(state_dict))


def _tokenizer(
    checkpoint: Checkpoint, config: ml_collections.ConfigDict
) -> tuple[TokenizerConfig, Params]:
    """The config that the file carries counts, not the one that is given."""
    if checkpoint.config is None:
        model = build(TokenizerConfig, config.model.to_dict(), "config.model")
    else:
        model = dar.tokenizer_config(checkpoint.config)
        logging.info("Taking the model's config from the checkpoint")
    return model, dar.tokenizer_params(checkpoint.state_dict, model)


def _companion(
    path: str, name: str, kind: str, check: Callable[[Any, str], None]
) -> dict[str, pathlib.Path]:
    """The model directory that the written one will hold as `name`, if there is one yet.

    Args:
        path: value of `config.NAME`.
        name: see `model_dir.COMPANION_NAMES`.
        kind: of model.
        check: raises ValueError unless the config of the model at a path fits.
    """
    directory = model_dir.locate(path)
    if not directory.is_dir():
        logging.warning(
            "There is no %s in %s: before sampling, convert again with "
            "--config.%s=DIR, or put its model directory at WORKDIR/model/%s",
            name,
            path,
            name,
            name,
        )
        return {}
    loaded = model_dir.load_config(directory, kind)
    check(build(MODELS[kind][1], loaded["model"], str(directory)), str(directory))
    return {name: directory}


def _report(checkpoint: Checkpoint, unused: Sequence[str]) -> None:
    """Log where the weights were and which tensors were left out."""
    names = checkpoint.state_dict
    left_out = [n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in unused)]
    logging.info("Read %d tensors from %s", len(names), checkpoint.container or "the file")
    if left_out:
        first = ", ".join(left_out[:MAX_LISTED])
        logging.info("Left out %d tensors that are no parameters: %s", len(left_out), first)


@contextmanager
def _errors_name(source: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


@contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"cannot write {path} ({error}); choose another workdir") from error
