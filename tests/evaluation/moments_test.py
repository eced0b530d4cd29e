"""Moments of parts, and the Frechet distance that they give, at full rank and below it."""

import functools
import operator

import numpy as np
import pytest
import scipy.linalg

from dar_jax.evaluation.frechet import frechet_distance
from dar_jax.evaluation.moments import Gaussian, Moments

FLOAT64 = 1e-10  # two ways through float64, relative
DIM = 12


def draw(count, seed=0, dim=DIM):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(count, dim)) @ rng.normal(size=(dim, dim)) + rng.normal(size=dim)
    return features.astype(np.float32)


def distance(a, b):
    return frechet_distance(Moments.of(a).gaussian(), Moments.of(b).gaussian())


@pytest.mark.parametrize("edges", [(), (1,), (7, 7, 30), (0, 50, 99)])
def test_moments_of_any_parts_are_those_of_the_whole(edges):
    # A mean far away: sums of squares in float32 would lose all of the variance.
    features = draw(100) + np.float32(1000)
    total = functools.reduce(operator.add, map(Moments.of, np.split(features, edges)))
    exact = features.astype(np.float64)
    assert total.count == 100
    np.testing.assert_allclose(total.mean, exact.mean(axis=0), rtol=FLOAT64)
    covariance = total.gaussian().covariance
    np.testing.assert_allclose(covariance, np.cov(exact, rowvar=False), rtol=FLOAT64, atol=FLOAT64)


def test_distance_does_not_depend_on_the_batches(monkeypatch):
    a, b = draw(100), draw(90, seed=1)
    expected = distance(a, b)
    monkeypatch.setattr("dar_jax.evaluation.moments.CHUNK", 7)
    assert distance(a, b) == pytest.approx(expected, rel=FLOAT64)


def test_moments_of_too_few_are_one_line():
    with pytest.raises(ValueError, match="needs at least 2 images, got 1"):
        Moments.of(draw(1)).gaussian()


def test_distance_equals_the_root_of_the_product():
    a, b = (Moments.of(draw(200, seed)).gaussian() for seed in (0, 1))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_distance_of_independent_features_is_that_of_their_deviations():
    rng = np.random.default_rng(0)
    means, deviations = rng.normal(size=(2, DIM)), rng.uniform(0, 3, size=(2, DIM))
    a, b = (Gaussian(m, np.diag(s**2)) for m, s in zip(means, deviations, strict=True))
    expected = np.sum((means[0] - means[1]) ** 2) + np.sum((deviations[0] - deviations[1]) ** 2)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=FLOAT64)


def test_distance_of_fewer_images_than_features_is_exact():
    """Rank deficient covariances: all vectors lie in 6 directions, whose distance is known."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(300, 6)))[0]
    a, b = draw(40, 0, dim=6).astype(float), draw(50, 1, dim=6).astype(float)
    assert distance(a @ basis.T, b @ basis.T) == pytest.approx(distance(a, b), rel=1e-9)
    few = draw(20, dim=300)
    assert distance(few, few) == pytest.approx(0, abs=1e-9 * np.trace(np.cov(few, rowvar=False)))


def test_distance_of_constants_and_of_other_features():
    ones = np.ones((3, 4), np.float32)
    assert distance(ones, ones) == 0
    assert distance(ones, 3 * ones) == 16
    with pytest.raises(ValueError, match=r"has shape \(12,\), expected \(4\)"):
        distance(ones, draw(30))
