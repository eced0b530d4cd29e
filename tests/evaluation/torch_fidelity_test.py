"""All metrics of given features against torch-fidelity."""

import importlib

import numpy as np
import pytest

from dar_jax.evaluation.frechet import frechet_distance
from dar_jax.evaluation.inception_score import inception_score
from dar_jax.evaluation.kid import kid
from dar_jax.evaluation.moments import Moments
from dar_jax.evaluation.precision_recall import precision_recall

pytestmark = pytest.mark.slow  # torch and torch-fidelity are large imports
TOLERANCE = 1e-6
SEED = 2020  # torch-fidelity's


@pytest.fixture
def metric(stub_torchvision):
    """Return torch-fidelity's module of a metric, and torch's constructor of tensors."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("torch_fidelity")

    def get(name):
        return importlib.import_module(f"torch_fidelity.metric_{name}"), torch.tensor

    return get


@pytest.fixture
def features():
    """Generated and real features: float32, skewed, with means as large as deviations."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(64, 64)) / 8
    fake, real = rng.gamma(1.0, size=(2, 500, 64))
    return (fake[:450] @ mixing * 0.9).astype(np.float32), (real @ mixing).astype(np.float32)


@pytest.mark.parametrize("count", [450, 40], ids=["full rank", "rank deficient"])
def test_fid_and_sfid(metric, features, count):
    module, tensor = metric("fid")
    # In float64: theirs takes the mean of float32 features in float32.
    fake, real = (part[:count].astype(np.float64) for part in features)
    statistics = [module.fid_features_to_statistics(tensor(part)) for part in (fake, real)]
    expected = module.fid_statistics_to_metric(*statistics, verbose=False)
    found = frechet_distance(Moments.of(fake).gaussian(), Moments.of(real).gaussian())
    assert found == pytest.approx(expected["frechet_inception_distance"], rel=TOLERANCE)


def test_inception_score(metric):
    module, tensor = metric("isc")
    logits = 3 * np.random.default_rng(0).normal(size=(505, 1008)).astype(np.float32)
    expected = module.isc_features_to_metric(tensor(logits), splits=10)
    shuffled = logits[np.random.RandomState(SEED).permutation(len(logits))]
    expected = expected["inception_score_mean"], expected["inception_score_std"]
    assert inception_score(shuffled) == pytest.approx(expected, rel=TOLERANCE)


def test_kid(metric, features):
    module, tensor = metric("kid")
    settings = dict(kid_subsets=10, kid_subset_size=100, rng_seed=SEED, verbose=False)
    fake, real = (part.astype(np.float64) for part in features)
    expected = module.kid_features_to_metric(tensor(fake), tensor(real), **settings)
    found = kid(*features, np.random.RandomState(SEED), subsets=10, subset_size=100)
    expected = expected["kernel_inception_distance_mean"], expected["kernel_inception_distance_std"]
    assert found == pytest.approx(expected, rel=TOLERANCE)


def test_precision_and_recall(metric, features):
    module, tensor = metric("prc")
    settings = dict(prc_neighborhood=3, prc_batch_size=128, save_cpu_ram=True, verbose=False)
    fake, real = features
    expected = module.prc_features_to_metric(tensor(fake), tensor(real), **settings)
    found = precision_recall(real, fake)
    assert 0 < found[1] < found[0] < 1
    assert found == pytest.approx((expected["precision"], expected["recall"]), rel=TOLERANCE)
