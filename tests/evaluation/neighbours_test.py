"""Generated images beside the real ones that are most like them."""

import types

import numpy as np
from PIL import Image

from dar_jax.common.image import LEGIBLE_SIZE
from dar_jax.config import build
from dar_jax.evaluation import neighbours
from dar_jax.evaluation.evaluators import base as evaluators
from dar_jax.modes.evaluate import evaluate
from tests import tiny_model
from tests.faults.cheap import MeanExtractor
from tests.faults.places import config_of, pictures

SIZE = LEGIBLE_SIZE  # so that nothing is enlarged


class Pixels:
    """Images of an array, by which they are alike."""

    size = (SIZE, SIZE)
    identity = types.MappingProxyType({})

    def __init__(self, pixels):
        self.pixels = pixels
        self.features = pixels.reshape(len(pixels), -1).astype(np.float32)

    def __len__(self):
        return len(self.pixels)

    def read(self, first, stop):
        return self.pixels[first:stop]


def test_nearest_come_first():
    real = np.array([[0.0, 0], [3, 4], [1, 0], [0, 6]], np.float32)
    found = neighbours.nearest(np.array([[0, 0], [0, 5]], np.float32), real, 3)
    np.testing.assert_array_equal(found, [[0, 2, 1], [3, 1, 0]])
    assert neighbours.nearest(real, real[:2], 3).shape == (4, 2)


def test_picture_has_an_image_and_those_like_it_in_each_row():
    real = Pixels(np.random.default_rng(0).integers(0, 256, (20, SIZE, SIZE, 3), np.uint8))
    made = Pixels(real.pixels[::-1][:12])  # by heart
    drawn = neighbours.picture(made, made.features, real, real.features, ["a", "b", "c"])
    cell, columns = SIZE + 1, neighbours.COLUMNS + 1  # a cell has a border
    top, left = (drawn.shape[0] - neighbours.ROWS * cell, drawn.shape[1] - columns * cell)
    body = drawn[top:, left:].reshape(neighbours.ROWS, cell, columns, cell, 3)[:, :-1, :, :-1]
    shown = made.pixels[np.linspace(0, 11, neighbours.ROWS).round().astype(int)]
    np.testing.assert_array_equal(body[:, :, 0], shown)
    np.testing.assert_array_equal(body[:, :, 1], shown)
    assert not np.any(np.all(body[:, :, 2] == shown, axis=(1, 2, 3)))


def test_evaluation_draws_them(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluators, "FeatureExtractor", MeanExtractor)
    pictures(tmp_path)
    tiny_model.save(tmp_path / "models")
    config = config_of("dar", tmp_path)
    config.sample.update(model=str(tmp_path / "models/dar_prior"), guidance_scale=(2.0,))
    config.evaluate.update(evaluators="generation", features="vgg16", lpips="", classifier=False)
    config.evaluate.update(num_images=12, num_reference=8)
    evaluate(build(config), str(tmp_path / "run"))
    with Image.open(tmp_path / "run/evaluation/neighbours.png") as image:
        assert image.width > (neighbours.COLUMNS + 1) * tiny_model.SIZE
