"""The judge of samples on real digits."""

import numpy as np
import pytest

from dar_jax.data.sources import DataConfig
from dar_jax.evaluation.classifier import Classifier, balanced_accuracy
from dar_jax.evaluation.image_sources import SplitImages, read_all


def test_classifier_judges_held_out_digits():
    train, test = (SplitImages(DataConfig(), split) for split in ("train", "test"))
    classifier = Classifier(read_all(train), train.labels())
    assert classifier.accuracy(read_all(test), test.labels()) >= 0.95
    shape = read_all(test).shape
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert classifier.accuracy(noise, test.labels()) < 0.3


def test_colours_are_judged_where_there_are_any():
    """Two colours of one grey."""
    colours = np.array([[90, 0, 0], [0, 90, 0]], np.uint8)
    labels = np.arange(8) % 2
    pixels = np.broadcast_to(colours[labels][:, None, None], (8, 4, 4, 3))
    assert Classifier(pixels, labels).accuracy(pixels[::-1], labels[::-1]) == 1


def test_one_class_is_refused():
    with pytest.raises(ValueError, match=r"two classes, .* --config.evaluate.classifier=false"):
        Classifier(np.zeros((3, 4, 4, 3), np.uint8), np.zeros(3, np.int32))


def test_balanced_accuracy_weighs_classes_alike():
    labels, named = np.array([0, 0, 0, 1, 1]), np.array([0, 0, 0, 0, 2])
    assert balanced_accuracy(named, labels) == 0.5
