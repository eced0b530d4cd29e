"""Reading official checkpoints, `.pt` or `.safetensors`, without running anything they hold.

A `.pt`, of whatever suffix and of torch before 1.6 too, is a pickle. It is read by torch's
restricted unpickler (`weights_only`), which builds tensors and plain data, and here a few more
things that official files hold: NumPy's scalars, `argparse.Namespace`, and, as empty shells, the
classes of `SHELLS`. A file that names anything else is refused.
"""

import _codecs
import argparse
import pathlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from dar_jax.common import hub
from dar_jax.common.files import parse_json, read_regular
from dar_jax.common.tensors import open_tensors, read_whole, what_is

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pth.tar")
SAFETENSORS_SUFFIX = ".safetensors"
INDEX_SUFFIX = ".index.json"
"""Of a file that names the shards of a checkpoint, in its `weight_map`."""
MAX_INDEX_BYTES = 2**26
CONTAINERS = (
    *("ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "params_ema"),
    *("model", "module", "state_dict", "model_state_dict", "params"),
)
"""Entries that may hold the state dict, in the order of preference: the average first."""
WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""Put into names by `torch.compile`, by fully sharded training and by recomputation."""
DATA_PARALLEL = re.compile(r"^(?:module\.)+")
"""Put before every name by data-parallel training."""
SHELLS = (
    "config_util.Config",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
)
"""Classes whose instances are replaced by their attributes: no code of theirs is there."""
NUMPY_CODES = "?bBhHiIlLqQefd"
"""Types of NumPy's scalars."""
REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+)")
"""In torch's message about what a pickle names."""
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


class Shell:
    """Stands in for a class of `SHELLS`; the reference's config is a mapping over its `_data`."""


def read_checkpoint(source: str) -> Checkpoint:
    """Read an official checkpoint.

    Args:
        source: a `.safetensors` file, a file of torch's (`TORCH_SUFFIXES`; these need torch), or
            the index of either's shards, `NAME.safetensors.index.json`: a path, or
            `hf://owner/name/file`.

    Raises:
        ValueError: the file is missing, damaged, something else or holds no state dict, its pickle
            names what is not allowed, or a package that it needs is not installed.
    """
    path = pathlib.Path(_local(source))
    if not path.is_file():
        raise ValueError(f"{path} is not a file; pass a checkpoint's path or hf://owner/name/file")
    if path.name.endswith(INDEX_SUFFIX):
        checkpoint = _read_shards(source, path)
    elif path.suffix == SAFETENSORS_SUFFIX:
        checkpoint = Checkpoint(_read_safetensors(path))
    elif path.name.endswith(TORCH_SUFFIXES):
        checkpoint = _read_torch(path)
    else:
        known = ", ".join((*TORCH_SUFFIXES, SAFETENSORS_SUFFIX, SAFETENSORS_SUFFIX + INDEX_SUFFIX))
        raise ValueError(f"{path} must be a checkpoint with one of the suffixes {known}")
    state_dict = {_unwrapped(name): array for name, array in checkpoint.state_dict.items()}
    if len(state_dict) < len(checkpoint.state_dict):
        raise ValueError(f"{path} holds tensors twice, with and without a wrapper's prefix")
    return checkpoint._replace(state_dict=state_dict)


def _local(source: str) -> str:
    return hub.download_file(source) if hub.is_address(source) else source


def _unwrapped(name: str) -> str:
    return DATA_PARALLEL.sub("", WRAPPERS.sub("", name))


def _read_shards(source: str, index: pathlib.Path) -> Checkpoint:
    """Read the files that an index names, which are beside it."""
    try:
        places = parse_json(read_regular(index, MAX_INDEX_BYTES))["weight_map"]
        names = sorted(set(places.values()))
        if not names or any(pathlib.PurePath(name).name != name for name in names):
            raise ValueError("weight_map must name files beside it")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = what_is(index) or error
        raise ValueError(f"{index} is not the index of a checkpoint ({reason})") from error
    state_dict: dict[str, np.ndarray] = {}
    for name in names:
        path = pathlib.Path(_local(f"{source.rpartition('/')[0] or '.'}/{name}"))
        if not path.is_file():
            raise ValueError(f"{index} names the shard {name}, which is missing: get all shards")
        is_safe = path.suffix == SAFETENSORS_SUFFIX
        part = _read_safetensors(path) if is_safe else _read_torch(path).state_dict
        state_dict |= part
    if missing := sorted(places.keys() - state_dict.keys()):
        raise ValueError(
            f"{index} names {', '.join(missing[:MAX_LISTED])}, which the shards do not hold"
        )
    return Checkpoint(state_dict)


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with open_tensors(path) as tensors:
            return {name: _widen(read_whole(tensor)) for name, tensor in tensors.items()}
    except (OSError, safetensors.SafetensorError) as error:
        reason = what_is(path) or error
        raise ValueError(f"{path} is damaged or no safetensors file ({reason})") from error


def _widen(array: np.ndarray) -> np.ndarray:
    is_floating = jnp.issubdtype(array.dtype, jnp.floating)
    return array.astype(np.float32, copy=False) if is_floating else array


def _read_torch(path: pathlib.Path) -> Checkpoint:
    loaded = tensors = _unpickle(path)
    containers = []
    # An average that was not kept may be there without a tensor.
    while held := [n for n in CONTAINERS if isinstance(tensors.get(n), dict) and tensors[n]]:
        containers.append(held[0])
        tensors = tensors[held[0]]
    container = ".".join(containers)
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
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"{path} needs torch, which is not installed; run pip install 'dar-jax[convert]' or "
            "pass a .safetensors file"
        ) from error
    try:
        with torch.serialization.safe_globals(_allowed()):
            # Only files of torch 1.6 and later can be mapped into memory.
            is_new = zipfile.is_zipfile(path)
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_new)
        loaded = _plain(loaded)
    except Exception as error:  # a damaged pickle can fail in any way
        if isinstance(error, pickle.UnpicklingError) and (
            refused := REFUSED_GLOBAL.search(str(error))
        ):
            raise ValueError(
                f"{path} is refused: it would import {refused[1]}, but only tensors and plain data "
                "are read"
            ) from error
        reason = what_is(path) or (
            f"it is damaged, cut short, or was not written by torch.save, {type(error).__name__}"
        )
        raise ValueError(f"{path} is not a readable checkpoint ({reason})") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, expected a dict")
    return loaded


def _allowed() -> list[Any]:
    """What a pickle may name beside tensors and plain data."""
    scalar: Any = np.float32(0).__reduce__()[0]
    return [
        *(argparse.Namespace, _codecs.encode, np.dtype),
        *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
        *(type(np.dtype(code)) for code in NUMPY_CODES),
        *((Shell, name) for name in SHELLS),
    ]


def _is_tensor(value: Any) -> bool:
    """Whether it is a tensor with data of its own, neither sparse nor quantised nor abstract."""
    import torch  # pyright: ignore[reportMissingImports]

    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def _plain(value: Any) -> Any:
    """Replace shells and configs, whatever mappings they are, by dicts."""
    if isinstance(value, Shell):
        return _plain(vars(value).get("_data"))
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
