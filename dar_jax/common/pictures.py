"""Generated images that show and save themselves."""

import io
import math
import os
from collections.abc import Iterator

import jax
import numpy as np
import PIL.Image

from dar_jax.common import image as image_lib
from dar_jax.common.files import replacing
from dar_jax.common.typing import Any, Array


class Images:
    """Base class of a frozen dataclass with `images`, float32 [B, H, W, 3] in [-1, 1].

    It unpacks into its fields, as a tuple does.
    """

    images: Array

    def __iter__(self) -> Iterator[Any]:
        return iter(vars(self).values())

    def to_pil(self) -> list[PIL.Image.Image]:
        """Return one picture per image."""
        return [PIL.Image.fromarray(picture) for picture in self._pixels()]

    def grid(self, columns: int | None = None) -> PIL.Image.Image:
        """Return all images as one picture, row by row; by default about as wide as high."""
        pixels = self._pixels()
        columns = columns or math.ceil(math.sqrt(len(pixels)))
        return PIL.Image.fromarray(image_lib.grid(pixels, columns))

    def save(self, path: str | os.PathLike, columns: int | None = None) -> None:
        """Write `grid(columns)` to a picture file; its ending chooses the format."""
        with replacing(os.path.expanduser(path)) as temporary:
            self.grid(columns).save(temporary)

    def _pixels(self) -> np.ndarray:
        return image_lib.to_pixels(np.asarray(self.images))

    def _repr_png_(self) -> bytes:
        """What a notebook shows: the grid, small images enlarged."""
        file, grid = io.BytesIO(), self.grid()
        scale = max(1, image_lib.LEGIBLE_SIZE // self.images.shape[1])
        grid.resize((grid.width * scale, grid.height * scale), PIL.Image.Resampling.NEAREST).save(
            file, "PNG"
        )
        return file.getvalue()

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={_short(value)}" for name, value in vars(self).items())
        return f"{type(self).__name__}({fields})"


def _short(value: object) -> str:
    """Dtype and shape of an array, the value of anything else."""
    if isinstance(value, jax.Array | np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    return repr(value)
