"""Inception score, KID, precision and recall against their definitions, in float64."""

import numpy as np
import pytest

from dar_jax.evaluation import precision_recall as manifolds
from dar_jax.evaluation.inception_score import inception_score
from dar_jax.evaluation.kid import kid
from dar_jax.evaluation.precision_recall import precision_recall

TOLERANCE = 1e-6


def draw(count, dim=16, seed=0, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1, (count, dim)).astype(np.float32)


def test_inception_score_equals_definition():
    logits = 3 * draw(31, dim=20)
    exponentials = np.exp(logits.astype(np.float64))
    p = exponentials / exponentials.sum(axis=1, keepdims=True)
    scores = []
    for part in (p[:10], p[10:20], p[20:]):
        divergences = [np.sum(row * np.log(row / part.mean(axis=0))) for row in part]
        scores.append(np.exp(np.mean(divergences)))
    expected = np.mean(scores), np.std(scores)
    assert inception_score(logits, splits=3) == pytest.approx(expected, rel=TOLERANCE)


def test_inception_score_is_bounded_by_its_extremes():
    confident = 100 * np.eye(8, dtype=np.float32)
    assert inception_score(confident, splits=1)[0] == pytest.approx(8)
    assert inception_score(np.zeros((6, 8), np.float32), splits=2) == pytest.approx((1, 0))
    with pytest.raises(ValueError, match="10 splits of 8 images"):
        inception_score(confident)


def test_kid_equals_definition():
    x, y = draw(9).astype(np.float64), draw(9, seed=1, shift=0.3).astype(np.float64)

    def mean_kernel(pairs):
        return np.mean([(u @ v / 16 + 1) ** 3 for u, v in pairs])

    different = [(i, j) for i in range(9) for j in range(9) if i != j]
    expected = mean_kernel([(x[i], x[j]) for i, j in different])
    expected += mean_kernel([(y[i], y[j]) for i, j in different])
    expected -= 2 * mean_kernel([(u, v) for u in x for v in y])
    # Subsets of everything: drawing them changes their order alone.
    found = kid(x, y, np.random.default_rng(0), subsets=2, subset_size=9)
    assert found == pytest.approx((expected, 0), rel=TOLERANCE, abs=1e-12)


def test_kid_of_one_distribution_is_around_zero():
    mean, deviation = kid(draw(400), draw(300, seed=1), np.random.default_rng(0), subset_size=50)
    assert deviation > 0 and abs(mean) < deviation
    with pytest.raises(ValueError, match="subsets of 2 to 300, not 1000"):
        kid(draw(400), draw(300), np.random.default_rng(0))


def brute_force_coverage(queries, points, k):
    def distances(a, b):
        return np.linalg.norm(a.astype(np.float64)[:, None] - b, axis=2)

    radii = np.sort(distances(points, points), axis=1)[:, k]
    return np.mean(np.any(distances(queries, points) <= radii, axis=1))


@pytest.mark.parametrize("block", [16, 64, 1024])
def test_precision_and_recall_equal_definition_whatever_the_blocks(block, monkeypatch):
    monkeypatch.setattr(manifolds, "BLOCK", block)
    real, fake = draw(70), 0.8 * draw(50, seed=1) + np.float32(0.2)
    expected = brute_force_coverage(fake, real, 3), brute_force_coverage(real, fake, 3)
    assert 0 < expected[1] < expected[0] < 1
    assert precision_recall(real, fake) == pytest.approx(expected, rel=TOLERANCE)


def test_precision_and_recall_fall_with_quality_and_with_diversity():
    real = draw(60)
    assert precision_recall(real, real + np.float32(1e-3)) == (1, 1)
    assert precision_recall(real, draw(60, shift=9.0)) == (0, 0)
    precision, recall = precision_recall(real, np.repeat(real[:5], 8, axis=0))
    assert precision == 1 and recall == pytest.approx(5 / 60)
    with pytest.raises(ValueError, match="3 neighbours need more than 3 images; got 60 real and 3"):
        precision_recall(real, real[:3])
