"""Reading official checkpoints, `.pt` or `.safetensors`, without running anything they hold.

A `.pt` is a pickle. It is read by torch's restricted unpickler (`weights_only`), which builds
tensors and plain data, and here two more classes that official files hold: `argparse.Namespace`
and the reference's `config_util.Config`. A file that names anything else is refused unread.
"""

import argparse
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from dar_jax.common import hub

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt")
SAFETENSORS_SUFFIX = ".safetensors"
CONTAINERS = ("ema", "model_ema", "model", "module", "state_dict")
"""Entries that may hold the state dict, in the order of preference: the average first."""
WRAPPER_PREFIX = re.compile(r"^((_orig_mod|module)\.)+")
"""Put before every name by `torch.compile` and by data-parallel training."""
REFERENCE_CONFIG = "config_util.Config"
MAX_LISTED = 5


class Checkpoint(NamedTuple):
    """What a file holds.

    Attributes:
        state_dict: arrays under the reference's names, float32 whatever the file's precision.
        container: entry of the file that held the state dict; empty if the file is nothing else.
        config: the reference's config, where the file carries it, as plain data.
    """

    state_dict: dict[str, np.ndarray]
    container: str = ""
    config: dict[str, Any] | None = None


class ReferenceConfig:
    """Stands in for the reference's config class: a mapping over its attribute `_data`."""


def read_checkpoint(source: str) -> Checkpoint:
    """Read an official checkpoint.

    Args:
        source: a `.safetensors` file, or a `.pt`, `.pth` or `.ckpt` file (which needs torch): a
            path, or `hf://owner/name/file`.

    Raises:
        ValueError: the file is missing, damaged or holds no state dict, its pickle names what is
            not allowed, or a package that it needs is not installed.
    """
    path = pathlib.Path(hub.download_file(source) if hub.is_address(source) else source)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; pass a checkpoint's path or hf://owner/name/file")
    if path.suffix == SAFETENSORS_SUFFIX:
        checkpoint = Checkpoint(_read_safetensors(path))
    elif path.suffix in TORCH_SUFFIXES:
        checkpoint = _read_torch(path)
    else:
        known = ", ".join((*TORCH_SUFFIXES, SAFETENSORS_SUFFIX))
        raise ValueError(f"{path} must be a checkpoint with one of the suffixes {known}")
    state_dict = {WRAPPER_PREFIX.sub("", n): a for n, a in checkpoint.state_dict.items()}
    if len(state_dict) < len(checkpoint.state_dict):
        raise ValueError(f"{path} holds tensors twice, with and without a wrapper's prefix")
    return checkpoint._replace(state_dict=state_dict)


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: _widen(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error})") from error


def _widen(array: np.ndarray) -> np.ndarray:
    is_floating = jnp.issubdtype(array.dtype, jnp.floating)
    return array.astype(np.float32, copy=False) if is_floating else array


def _read_torch(path: pathlib.Path) -> Checkpoint:
    loaded = _unpickle(path)
    # An average that was not kept may be there without a tensor.
    held = (n for n in CONTAINERS if isinstance(loaded.get(n), dict) and loaded[n])
    container = next(held, "")
    tensors = loaded[container] if container else loaded
    if not all(map(_is_tensor, tensors.values())):
        found = ", ".join(map(str, list(tensors)[:MAX_LISTED]))
        raise ValueError(
            f"{path} holds no state dict by itself or under {', '.join(CONTAINERS)}; found {found}"
        )
    state_dict = {
        str(name): (tensor.float() if tensor.is_floating_point() else tensor).detach().numpy()
        for name, tensor in tensors.items()
    }
    config = loaded.get("config")
    return Checkpoint(state_dict, container, config if isinstance(config, dict) else None)


def _unpickle(path: pathlib.Path) -> dict[str, Any]:
    """Read the dict that a `.pt` holds; its tensors stay on disk until they are used."""
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path} needs torch, which is not installed; run pip install 'dar-jax[convert]' or "
            "pass a .safetensors file"
        ) from error
    allowed = [argparse.Namespace, (ReferenceConfig, REFERENCE_CONFIG)]
    try:
        with torch.serialization.safe_globals(allowed):
            refused = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
            loaded = {}
            if not refused:
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        loaded = _plain(loaded)
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(
            f"{path} is not a readable checkpoint: it is damaged, cut short, or was not written by "
            f"torch.save of torch 1.6 or later ({type(error).__name__})"
        ) from error
    if refused:
        raise ValueError(
            f"{path} is refused: it would import {', '.join(refused[:MAX_LISTED])}, but only "
            "tensors and plain data are read"
        )
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, expected a dict")
    return loaded


def _is_tensor(value: Any) -> bool:
    """Whether it is a tensor with data of its own, neither sparse nor quantised nor abstract."""
    import torch

    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def _plain(value: Any) -> Any:
    """Replace configs, whatever mappings they are, by dicts."""
    if isinstance(value, ReferenceConfig):
        return _plain(vars(value).get("_data"))
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
