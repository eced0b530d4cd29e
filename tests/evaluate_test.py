"""`--mode=evaluate`: figures do not depend on how images are batched."""

import dataclasses

import numpy as np
import pytest

from configs import common
from dar_jax import evaluate, generation
from dar_jax.evaluation.classifier import Classifier
from tests import tiny_model

NUM_IMAGES = 12


class BrightnessClassifier(Classifier):
    """Calls everything by the tens digit of its mean."""

    def __init__(self):
        pass

    def predict(self, pixels):
        return (pixels.mean(axis=(1, 2, 3)) // 10 % 10).astype(int)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Load the model with a batch size: (settings, pipeline)."""
    path = tiny_model.save(tmp_path_factory.mktemp("models"))

    def load(batch_size):
        config = common.base()
        config.sample.update(model=str(path), batch_size=batch_size)
        return generation.load(config, "")

    return load


def test_reconstruction_does_not_depend_on_the_batch_size(load):
    size = tiny_model.SIZE
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, size, size, 3), np.uint8)
    results = []
    for batch_size in (8, 100):
        settings, pipeline = load(batch_size)
        results.append(evaluate.reconstruct(pipeline, settings, pixels))
    (images, indices), (others, other_indices) = results
    np.testing.assert_array_equal(indices, other_indices)
    np.testing.assert_allclose(images.astype(int), others.astype(int), atol=1)
    assert images.shape == pixels.shape


def test_solver_of_the_config_draws_reconstructions_and_generated_images(load):
    settings, pipeline = load(8)
    size = tiny_model.SIZE
    pixels = np.random.default_rng(0).integers(0, 256, (8, size, size, 3), np.uint8)
    labels = np.arange(8, dtype=np.int32)
    results = {}
    for solver in ("adams_bashforth2", "euler"):
        chosen = dataclasses.replace(settings, solver=solver)
        reconstruction, _ = evaluate.reconstruct(pipeline, chosen, pixels)
        (batch,) = evaluate.generate(pipeline, labels, chosen)
        results[solver] = (
            reconstruction,
            batch.previews[-1],
            batch.kept["indices"],
            batch.previews[0],
        )
    for found, other in list(zip(*results.values(), strict=True))[:2]:
        assert np.abs(found.astype(int) - other.astype(int)).max() > 1
    for found, other in list(zip(*results.values(), strict=True))[2:]:
        np.testing.assert_array_equal(found, other)  # tokens, and the first step


def test_generation_is_judged_after_every_group(load):
    settings, pipeline = load(8)
    asked = evaluate.EvaluateConfig(NUM_IMAGES)
    classifier = BrightnessClassifier()
    figures = evaluate.evaluate_generation(pipeline, classifier, asked, settings)
    labels = np.arange(NUM_IMAGES, dtype=np.int32) % tiny_model.NUM_CLASSES
    batches = list(evaluate.generate(pipeline, labels, settings))
    assert [len(batch.labels) for batch in batches] == [8, 4]
    previews = np.concatenate([batch.previews for batch in batches], axis=1)
    expected = [classifier.accuracy(preview, labels) for preview in previews]
    assert figures["generation/accuracy_after_each_group"] == pytest.approx(expected)
    assert figures["generation/accuracy"] == pytest.approx(expected[-1])
