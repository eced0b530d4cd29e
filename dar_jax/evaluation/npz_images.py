"""Images in an `.npz` as the ADM evaluation suite has them, read without holding all of them."""

import os
import zipfile
from collections.abc import Iterator

import numpy as np

from dar_jax.common.typing import UInt8

ARRAY = "arr_0"
HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class NpzImages:
    """The array `arr_0`, uint8 [N, H, W, 3], of an `.npz`.

    Attributes:
        path: the file.
        shape: (N, H, W, 3).
    """

    def __init__(self, path: str | os.PathLike):
        """Read the header.

        Raises:
            ValueError: the file is unreadable, has no `arr_0`, or that is something else.
        """
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive, archive.open(f"{ARRAY}.npy") as file:
                self.shape, is_fortran, dtype = _read_header(file)
        except KeyError as error:
            raise ValueError(f"{path} has no images: it lacks the array {ARRAY}") from error
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is no readable .npz ({error})") from error
        if dtype != np.uint8 or is_fortran or len(self.shape) != 4 or self.shape[3] != 3:
            raise ValueError(
                f"{path}: {ARRAY} is {dtype} {self.shape}, expected uint8 (N, height, width, 3)"
            )

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, batch_size: int) -> Iterator[UInt8[np.ndarray, "n H W 3"]]:
        """Yield the images in order, `batch_size` at a time; the last batch may be shorter.

        Raises:
            ValueError: the file ends too early or is damaged.
        """
        item = int(np.prod(self.shape[1:]))
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{ARRAY}.npy") as file:
                _read_header(file)
                for first in range(0, len(self), batch_size):
                    count = min(batch_size, len(self) - first)
                    data = np.frombuffer(file.read(count * item), np.uint8)
                    yield data.reshape(count, *self.shape[1:])
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.path} is damaged or cut short ({error})") from error


def _read_header(file: zipfile.ZipExtFile) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the shape, whether it is in Fortran's order, and the dtype."""
    version = np.lib.format.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"format {version} of {ARRAY} is unknown")
    return HEADERS[version](file)
