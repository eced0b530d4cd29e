"""Generated images as people see them."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from dar_jax.common.pictures import Images


@dataclasses.dataclass(frozen=True, repr=False)
class Drawn(Images):
    images: np.ndarray
    indices: np.ndarray


@pytest.fixture
def drawn():
    images = np.linspace(-1, 1, 5 * 8 * 6 * 3, dtype=np.float32).reshape(5, 8, 6, 3)
    return Drawn(images, np.zeros((5, 4), np.int32))


def test_images_become_pictures(drawn):
    pictures = drawn.to_pil()
    assert [picture.size for picture in pictures] == [(6, 8)] * 5
    assert pictures[0].getpixel((0, 0)) == (0, 0, 1)
    assert pictures[4].getpixel((5, 7)) == (254, 255, 255)


@pytest.mark.parametrize("name", ["grid.png", "grid.jpg", "grid.webp"])
def test_grid_is_saved_in_the_format_of_its_name(drawn, tmp_path, name):
    drawn.save(tmp_path / name, columns=5)
    with Image.open(tmp_path / name) as picture:
        assert picture.size == (5 * 7, 9)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_notebook_shows_small_images_enlarged(drawn):
    with Image.open(io.BytesIO(drawn._repr_png_())) as picture:
        assert picture.size == (3 * 7 * 8, 2 * 9 * 8)


def test_repr_is_short_and_unpacking_gives_the_fields(drawn):
    assert repr(drawn) == "Drawn(images=float32[5, 8, 6, 3], indices=int32[5, 4])"
    images, indices = drawn
    assert images is drawn.images and indices is drawn.indices
