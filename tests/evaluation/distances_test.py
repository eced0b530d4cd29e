"""Comparing images with a reference: metrics, floors, warnings, and what is not done twice."""

import logging

import numpy as np
import pytest

from dar_jax.common.files import write_npz
from dar_jax.data.base import DataConfig
from dar_jax.evaluation.distances import Comparison
from dar_jax.evaluation.evaluators.base import below
from dar_jax.evaluation.feature_store import FeatureStore
from dar_jax.evaluation.features import FeatureExtractor
from dar_jax.evaluation.frechet import frechet_distance
from dar_jax.evaluation.image_sources import SetImages, SplitImages, open_images, read_all
from dar_jax.evaluation.moments import Moments
from dar_jax.generation.image_set import ImageSet

SYNTHETIC = DataConfig(source="synthetic", image_size=8)
NUM_REAL = 300
EXACT = 1e-9  # float64
RNG = np.random.default_rng(0)
MATRICES = {"pool": RNG.normal(size=(192, 6)), "spatial": RNG.normal(size=(192, 3))}
SETS = (("real", 1), ("made", 2))
LOGITS = RNG.normal(size=(192, 4))


class LinearExtractor(FeatureExtractor):
    """Features that are linear in the pixels, and a record of how many images it saw."""

    def __init__(self, name="inception", fail_after=None):
        self.name = self.identity = name
        self.seen = []
        self.fail_after = fail_after
        matrices = MATRICES | {"logits": LOGITS} if name == "inception" else {}
        self.matrices = matrices or {"pool": MATRICES["pool"]}
        self.dims = {kind: matrix.shape[1] for kind, matrix in self.matrices.items()}

    def features(self, pixels):
        if self.fail_after is not None and len(self.seen) >= self.fail_after:
            raise KeyboardInterrupt
        self.seen.append(len(pixels))
        flat = pixels.reshape(len(pixels), -1) / 255
        return {kind: (flat @ m).astype(np.float32) for kind, m in self.matrices.items()}


def image_set(directory, count, seed=1):
    made = ImageSet(directory / f"set-{seed}", count, (0,))
    made.bind({"seed": seed})
    pixels = np.random.default_rng(seed).integers(0, 200, (count, 8, 8, 3), dtype=np.uint8)
    made.write(0, pixels, {})
    return SetImages(made, {"seed": seed})


def compare(directory, extractor, reference="train"):
    return Comparison(FeatureStore(directory, extractor), reference, SYNTHETIC, NUM_REAL)


def distance(extractor, images, others, kind="pool"):
    gaussians = (
        Moments.of(extractor.features(read_all(part))[kind]).gaussian() for part in (images, others)
    )
    return frechet_distance(*gaussians)


@pytest.mark.parametrize("names", [("mu", "sigma", "arr_0"), ("arr_0",)])
def test_reference_and_images_in_a_bucket_are_those_in_a_folder(names, in_bucket, tmp_path):
    extractor, found = LinearExtractor(), []
    real, pictures = (read_all(image_set(tmp_path / name, 50, seed)) for name, seed in SETS)
    pool = extractor.features(real)["pool"]
    arrays = {"mu": pool.mean(axis=0), "sigma": np.cov(pool, rowvar=False), "arr_0": real}
    for where in (tmp_path, in_bucket):
        write_npz(where / "reference.npz", {name: arrays[name] for name in names})
        write_npz(where / "images.npz", {"arr_0": pictures})
        images = open_images(str(where / "images.npz"))
        found.append(compare(where, extractor, str(where / "reference.npz")).metrics(images))
    assert found[0] == found[1] and "kid" in found[0]


def test_reference_and_images_that_a_bucket_has_not_are_one_line(in_bucket, tmp_path):
    with pytest.raises(ValueError, match=f"reference='{in_bucket}/a.npz' is not an .npz file"):
        compare(tmp_path, LinearExtractor(), f"{in_bucket}/a.npz")
    with pytest.raises(ValueError, match=f"{in_bucket}/a.npz is not a readable .npz"):
        open_images(f"{in_bucket}/a.npz")
    with pytest.raises(ValueError, match=f"{in_bucket} is no .npz file; .* mount the bucket"):
        open_images(f"{in_bucket}")


def test_inception_gives_all_figures(tmp_path):
    extractor, images = LinearExtractor(), image_set(tmp_path, 50)
    metrics = compare(tmp_path, extractor).metrics(images)
    real = SplitImages(SYNTHETIC, "train", NUM_REAL)
    assert metrics["fid"] == pytest.approx(distance(extractor, images, real), rel=EXACT)
    assert metrics["sfid"] == pytest.approx(distance(extractor, images, real, "spatial"), rel=EXACT)
    assert set(metrics) == {"fid", "sfid", "kid", "precision", "recall", "inception_score"}


def test_other_features_stand_beside_their_floor_of_as_many_images(tmp_path):
    extractor = LinearExtractor("vgg16")
    comparison = compare(tmp_path, extractor)
    real = SplitImages(SYNTHETIC, "train", NUM_REAL)
    for count in (50, 1100):  # the other split has 1024 images
        images = image_set(tmp_path, count, seed=count)
        metrics = comparison.metrics(images)
        assert metrics["fd_vgg16_images"] == min(count, 1024)
        floor = distance(extractor, SplitImages(SYNTHETIC, "test", count), real)
        assert metrics["fd_vgg16_floor"] == pytest.approx(floor, rel=EXACT)
        first = SetImages(ImageSet(images.pieces.directory, min(count, 1024), (0,)), {})
        assert metrics["fd_vgg16"] == pytest.approx(distance(extractor, first, real), rel=EXACT)
    names = {"fd_vgg16", "fd_vgg16_floor", "fd_vgg16_images"}
    assert set(metrics) == names | {"kd_vgg16", "precision_vgg16", "recall_vgg16"}


def test_few_images_are_said_with_the_floor(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        compare(tmp_path, LinearExtractor()).metrics(image_set(tmp_path, 10, seed=10))
        assert not caplog.messages
        extractor = LinearExtractor()
        extractor.dims["pool"] = 11
        compare(tmp_path, extractor).metrics(image_set(tmp_path, 10, seed=10))
    (message,) = caplog.messages
    floor = distance(
        extractor, *(SplitImages(SYNTHETIC, *part) for part in (("test", 10), ("train", NUM_REAL)))
    )
    assert "fid of 10 images in 11 features: the covariance is rank-deficient" in message
    assert f"is {floor:.4g} (10 images)" in message


def test_reference_file_gives_what_it_has(tmp_path, caplog):
    extractor, images = LinearExtractor(), image_set(tmp_path, 50)
    real = SplitImages(SYNTHETIC, "train", NUM_REAL)
    gaussian = Moments.of(extractor.features(read_all(real))["pool"]).gaussian()
    np.savez(tmp_path / "a.npz", mu=gaussian.mean, sigma=gaussian.covariance)
    with caplog.at_level(logging.WARNING):
        metrics = compare(tmp_path, extractor, str(tmp_path / "a.npz")).metrics(images)
    assert set(metrics) == {"fid", "inception_score"}
    assert metrics["fid"] == pytest.approx(distance(extractor, images, real), rel=EXACT)
    assert ["sfid" in m or "kid" in m for m in caplog.messages] == [True, True]

    np.savez(tmp_path / "b.npz", mu=gaussian.mean, sigma=gaussian.covariance, arr_0=read_all(real))
    more = compare(tmp_path, extractor, str(tmp_path / "b.npz")).metrics(images)
    assert more["fid"] == metrics["fid"] and "precision" in more


def test_reference_of_a_split_becomes_a_file(tmp_path):
    images = image_set(tmp_path, 50)
    metrics = compare(tmp_path, LinearExtractor()).metrics(images)
    path = str(tmp_path / "reference_train_inception.npz")
    again = compare(tmp_path / "other", LinearExtractor(), path).metrics(images)
    assert again == pytest.approx(metrics, rel=EXACT)


def test_images_of_another_size_are_refused(tmp_path):
    other = DataConfig(source="synthetic", image_size=16)
    comparison = Comparison(FeatureStore(tmp_path, LinearExtractor()), "train", other, NUM_REAL)
    with pytest.raises(ValueError, match="of 8 x 8 pixels cannot be compared with images of 16 x"):
        comparison.metrics(image_set(tmp_path, 50))


@pytest.mark.parametrize("reference", ["none.npz", "validation", ""])
def test_other_references_are_refused(tmp_path, reference):
    with pytest.raises(ValueError, match="is not an .npz file, nor one of train, test"):
        compare(tmp_path, LinearExtractor(), reference)


def test_killed_extraction_goes_on_and_is_shared(tmp_path, monkeypatch):
    monkeypatch.setattr("dar_jax.evaluation.feature_store.PIECE", 64)
    images = image_set(tmp_path, 200)
    store = FeatureStore(tmp_path, LinearExtractor(fail_after=2))
    with pytest.raises(KeyboardInterrupt):
        store.features(images)
    resumed = FeatureStore(tmp_path, LinearExtractor())
    features = resumed.features(images)
    assert resumed.extractor.seen == [64, 8]
    resumed.features(images)
    assert resumed.extractor.seen == [64, 8]
    expected = LinearExtractor().features(read_all(images))
    for kind in expected:
        np.testing.assert_allclose(features[kind], expected[kind], rtol=1e-6)


def test_features_that_are_not_finite_are_named_and_not_kept(tmp_path):
    extractor = LinearExtractor("vgg16")
    extractor.matrices = {"pool": MATRICES["pool"] * [1, 1, np.nan, 1, 1, 1]}
    store = FeatureStore(tmp_path, extractor)
    with pytest.raises(ValueError, match=r"pool features \(vgg16\) of images 0\.\.19: 20 of 120"):
        store.features(image_set(tmp_path, 20))
    assert not list(tmp_path.glob("features-*/*.npz"))


def test_few_images_have_every_figure_but_the_inception_score(tmp_path, caplog):
    logging.getLogger("absl").propagate = True
    with caplog.at_level("WARNING", logger="absl"):
        metrics = compare(tmp_path, LinearExtractor()).metrics(image_set(tmp_path, 8))
    assert np.isfinite(metrics["fid"]) and "inception_score" not in metrics
    assert "The Inception score needs 10 images at least, there are 8: left out" in caplog.messages


@pytest.mark.parametrize("value", [np.nan, [1.0, np.nan]])
def test_metric_that_is_nan_is_refused(value):
    assert below("generation", {"psnr_db": np.inf}) == {"generation/psnr_db": np.inf}
    with pytest.raises(ValueError, match="generation/kid is .*nan"):
        below("generation", {"kid": value})
