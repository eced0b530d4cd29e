"""The model directory: a released model as `{config.json, model.safetensors}`.

`config.json` holds `kind`, `model` (the architecture) and whatever else sampling needs;
`model.safetensors` holds the parameters under names such as "encoder/blocks/mlp/up/kernel".
A model that needs another one, as a prior its tokenizer, holds that one's directory inside.
"""

import json
import os
import pathlib
import shutil
import tempfile
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from dar_jax.common import tree
from dar_jax.common.typing import Params

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


def save_model(
    directory: str | os.PathLike,
    kind: str,
    model_config: Mapping[str, Any],
    params: Params,
    extra: Mapping[str, Any],
    *,
    companions: Mapping[str, str | os.PathLike] = types.MappingProxyType({}),
) -> None:
    """Write a model directory, whole or not at all; one that exists is replaced.

    Args:
        directory: the path; its parent must exist.
        kind: the task's kind, which says how to build the model.
        model_config: the architecture, as JSON types.
        params: nested dict of arrays that this process can read whole.
        extra: further entries of `config.json`, e.g. `class_names`.
        companions: other model directories to copy in, by subdirectory name.
    """
    config = {"kind": kind, "model": model_config, **extra}
    target = pathlib.Path(directory).absolute()
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        content = temporary / "new"
        content.mkdir()
        (content / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        arrays = {n: np.asarray(leaf, order="C") for n, leaf in tree.flatten(params).items()}
        safetensors.numpy.save_file(arrays, content / WEIGHTS_NAME)
        for name, companion in companions.items():
            shutil.copytree(companion, content / name)
        if target.exists():
            # A directory cannot be renamed over another one that has files in it.
            os.rename(target, temporary / "old")
        os.rename(content, target)
    finally:
        shutil.rmtree(temporary)


def load_model(directory: str | os.PathLike) -> tuple[dict[str, Any], Params]:
    """Read a model directory: its config and its parameters as NumPy arrays.

    Raises:
        ValueError: it is missing, unreadable or incomplete.
    """
    source = pathlib.Path(directory)
    try:
        config = json.loads((source / CONFIG_NAME).read_text())
        arrays = safetensors.numpy.load_file(source / WEIGHTS_NAME)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{source} is not a readable model directory ({error}); pass the one that training "
            "writes to WORKDIR/model or that convert writes"
        ) from error
    return config, tree.unflatten(arrays)
