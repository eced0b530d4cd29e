"""Images in an `.npz` as the ADM evaluation suite has them, read without holding all of them."""

import math
import os
import zipfile
from collections.abc import Mapping

import numpy as np

from dar_jax.common import storage
from dar_jax.common.files import ARCHIVE_ERRORS
from dar_jax.common.tensors import what_is
from dar_jax.common.typing import Any, UInt8

ARRAY = "arr_0"
HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class NpzImages:
    """The array `arr_0`, uint8 [N, H, W, 3], of an `.npz`; see `image_sources.Images`.

    Attributes:
        path: the file.
        shape: (N, H, W, 3).
    """

    def __init__(self, path: str | os.PathLike):
        """Open the file and read the header.

        Raises:
            ValueError: the file is unreadable, has no `arr_0`, or that is something else.
        """
        self.path = storage.to_path(path)
        try:
            archive = zipfile.ZipFile(storage.open_binary(self.path))
            self._checksum = archive.getinfo(f"{ARRAY}.npy").CRC
            self._file = archive.open(f"{ARRAY}.npy")
            self.shape, is_fortran, dtype = self._read_header()
        except KeyError as error:
            raise ValueError(f"{path} has no images: it lacks the array {ARRAY}") from error
        except ARCHIVE_ERRORS as error:
            reason = what_is(path) or error
            raise ValueError(f"{path} is not a readable .npz ({reason})") from error
        is_pixels = dtype == np.uint8 and len(self.shape) == 4 and self.shape[3] == 3
        if not is_pixels or is_fortran or not self.shape[0]:
            raise ValueError(
                f"{path}: {ARRAY} is {dtype} {self.shape}, expected uint8 (N, height, width, 3), "
                "N images and at least one"
            )
        self._start = self._file.tell()

    @property
    def identity(self) -> Mapping[str, Any]:
        size, time = storage.status(self.path)
        return {"checksum": self._checksum, "bytes": size, "modified": time}

    @property
    def size(self) -> tuple[int, int]:
        return self.shape[1], self.shape[2]

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, first: int, stop: int) -> UInt8[np.ndarray, "n H W 3"]:
        """Return the images `first` .. `stop - 1`; fastest in order.

        Raises:
            ValueError: the file ends too early or is damaged.
        """
        item = math.prod(self.shape[1:])
        try:
            self._file.seek(self._start + first * item)
            data = np.frombuffer(self._file.read((stop - first) * item), np.uint8)
            return data.reshape(stop - first, *self.shape[1:])
        except ARCHIVE_ERRORS as error:
            raise ValueError(f"{self.path} is damaged or cut short ({error})") from error

    def _read_header(self) -> tuple[tuple[int, ...], bool, np.dtype]:
        """Read the shape, whether it is in Fortran's order, and the dtype."""
        version = np.lib.format.read_magic(self._file)
        if version not in HEADERS:
            raise ValueError(f"format {version} of {ARRAY} is unknown")
        return HEADERS[version](self._file)
