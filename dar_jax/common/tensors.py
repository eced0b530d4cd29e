"""Reading `.safetensors` files, 8-bit floats too, and saying what a file is that cannot be read."""

import contextlib
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
import safetensors

SUFFIX = ".safetensors"
FLOAT8 = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}
"""8-bit floats, which the library knows and its NumPy side does not."""
LENGTH_BYTES = 8
"""The header of a file follows its length."""
START_BYTES = 512
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
PAGE = re.compile(rb"\s*<(!doctype|html|\?xml|head|body)", re.IGNORECASE)
ZIP_START = b"PK\x03\x04"


@runtime_checkable
class Tensor(Protocol):
    """A tensor that stays on disk until it is indexed."""

    def get_shape(self) -> Sequence[int]: ...
    def __getitem__(self, index: Any) -> np.ndarray: ...


class _Float8:
    """A tensor of 8-bit floats; what is read of it is float32."""

    def __init__(self, array: np.ndarray):
        self._array = array

    def get_shape(self) -> Sequence[int]:
        return self._array.shape

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self._array[index]).astype(np.float32)


@contextlib.contextmanager
def open_tensors(path: str | os.PathLike) -> Iterator[dict[str, Tensor]]:
    """Give the tensors of a file by name.

    Raises:
        OSError: it cannot be read.
        safetensors.SafetensorError: it is damaged or something else.
    """
    with safetensors.safe_open(path, framework="numpy") as file:
        tensors: dict[str, Tensor] = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        if any(tensor.get_dtype() in FLOAT8 for tensor in tensors.values()):  # pyright: ignore[reportAttributeAccessIssue]
            tensors |= _float8_tensors(path)
        yield tensors


def read_whole(tensor: Tensor) -> np.ndarray:
    """Read a tensor."""
    return tensor[(slice(None),) * len(tensor.get_shape())]


def _float8_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
    data = np.memmap(path, np.uint8, "r", offset=LENGTH_BYTES + length)
    return {
        name: _Float8(data[slice(*entry["data_offsets"])].view(dtype).reshape(entry["shape"]))
        for name, entry in header.items()
        if (dtype := FLOAT8.get(entry.get("dtype"))) is not None
    }


def what_is(path: str | os.PathLike) -> str:
    """Say what a file of weights or arrays is that could not be read; "" if that is not known."""
    try:
        with open(path, "rb") as file:
            start = file.read(START_BYTES)
    except OSError:
        return ""
    if not start:
        return "it is empty"
    if start.startswith(LFS_POINTER):
        return "it is a git-lfs pointer, not the file itself: fetch that with git lfs pull"
    if PAGE.match(start):
        return "it is an HTML page, not the file itself: download that"
    is_cut = start.startswith(ZIP_START) and not zipfile.is_zipfile(path)
    return "it is cut short: download or copy it again" if is_cut or _is_cut_short(path) else ""


def _is_cut_short(path: str | os.PathLike) -> bool:
    """Tell whether a `.safetensors` file has fewer bytes than its header says."""
    path = pathlib.Path(path)
    if path.suffix != SUFFIX:
        return False
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if length > size - LENGTH_BYTES:  # a header begins with a brace
            return file.read(1) in (b"{", b"")
        try:
            entries = json.loads(file.read(length)).values()
            ends = [entry["data_offsets"][1] for entry in entries if "dtype" in entry]
            return size < LENGTH_BYTES + length + max(ends, default=0)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return False
