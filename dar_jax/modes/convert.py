"""`--mode=convert`: an official checkpoint to a model directory, or a model directory back."""

import dataclasses
import fnmatch
import pathlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import safetensors
from absl import logging

from dar_jax.common import model_dir, storage
from dar_jax.common.files import write_safetensors
from dar_jax.common.tree import num_parameters
from dar_jax.config import Config
from dar_jax.convert import frozen
from dar_jax.convert.checkpoints import Checkpoint, read_checkpoint
from dar_jax.kinds import find_kind
from dar_jax.kinds.base import Kind
from dar_jax.kinds.loading import open_model
from dar_jax.nn.functional_model import FunctionalModel

MAX_LISTED = 5


def convert(config: Config, workdir: str) -> None:
    """Convert `config.convert.source`; nothing is written unless all of it fits.

    Raises:
        ValueError: the source cannot be read or does not fit the model, or the workdir cannot be
            written.
    """
    settings = config.convert
    if settings.net:
        frozen_to_jax(settings.net, settings.source, storage.to_path(workdir))
    elif settings.to == "torch":
        to_torch(settings.source or workdir, storage.to_path(workdir))
    else:
        to_jax(settings.source, config, storage.to_path(workdir))


def to_jax(source: str, config: Config, workdir: storage.Path) -> None:
    """Write the model directory of an official checkpoint."""
    if not source:
        raise ValueError("config.convert.source is empty: name a path or hf://owner/name/file")
    checkpoint, kind = read_checkpoint(source), find_kind(config.task, "config.task")
    with _errors_name(source):
        model, params, unused = kind.from_reference(checkpoint, config.model)
    _report(checkpoint, unused)
    companions = {}
    for name in kind.companions:
        companions |= _companion(kind, model, name, config.companions[name])
    directory = workdir / model_dir.WORKDIR_NAME
    with _writing(directory):
        model_dir.save_model(
            directory,
            kind.released_kind,
            dataclasses.asdict(model),
            params,
            config.sample.recommendation(kind),
            companions=companions,
            about={"converted from": pathlib.Path(source).name},
        )
    logging.info("Wrote %s with %d parameters", directory, num_parameters(params))


def frozen_to_jax(net: str, source: str, workdir: storage.Path) -> None:
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


def to_torch(source: str, workdir: storage.Path) -> None:
    """Write a model directory as a state dict under the reference's names."""
    directory, kind, model, *_ = open_model(source)
    like = FunctionalModel(kind.module, model).abstract_params()
    state_dict = kind.to_reference(model_dir.load_params(directory, like), model)
    path = workdir / f"{kind.name}.safetensors"
    with _writing(path):
        write_safetensors(path, state_dict, {"format": "pt"})
    logging.info("Wrote %s with %d tensors", path, len(state_dict))


def _companion(kind: Kind, model: Any, name: str, path: str) -> dict[str, pathlib.Path]:
    """The model directory that the written one will hold as `name`, if there is one yet.

    Args:
        kind: of the model that is converted.
        model: its architecture.
        name: of the companion.
        path: value of `config.NAME`.
    """
    if not model_dir.locate(path).is_dir():
        logging.warning(
            "There is no %s in %s: before sampling, convert again with "
            "--config.%s=DIR, or put its model directory at WORKDIR/model/%s",
            name,
            path,
            name,
            name,
        )
        return {}
    opened = open_model(path, kind.companions[name])
    kind.check_companion(model, name, opened.architecture, str(opened.path))
    return {name: opened.path}


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
def _writing(path: storage.Path) -> Iterator[None]:
    try:
        storage.make_directory(path.parent)
        yield
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"cannot write {path} ({error}); choose another workdir") from error
