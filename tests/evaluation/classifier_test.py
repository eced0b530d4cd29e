"""The judge of samples on real digits."""

import numpy as np

from dar_jax.data.sources import DataConfig
from dar_jax.evaluate import load_pixels
from dar_jax.evaluation.classifier import Classifier


def test_classifier_judges_held_out_digits():
    train, test = (load_pixels(DataConfig(), split) for split in ("train", "test"))
    classifier = Classifier(*train)
    assert classifier.accuracy(*test) >= 0.95
    noise = np.random.default_rng(0).integers(0, 256, test[0].shape, dtype=np.uint8)
    assert classifier.accuracy(noise, test[1]) < 0.3
