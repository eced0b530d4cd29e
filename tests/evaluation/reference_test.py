"""Reference statistics from the files of other evaluation suites, and from images."""

import numpy as np
import pytest

from dar_jax.evaluation.features import FeatureExtractor
from dar_jax.evaluation.frechet import frechet_distance
from dar_jax.evaluation.moments import Moments
from dar_jax.evaluation.npz_images import NpzImages
from dar_jax.evaluation.reference import ReferenceStatistics, has_images
from tests.damage import outcome

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), dtype=np.uint8)
EXACT = 1e-12  # float64
FLIPS = 200
"""Of a file, at least."""


def pool(pixels):
    return pixels.reshape(len(pixels), -1)[:, :5].astype(np.float32)


def spatial(pixels):
    return pixels.reshape(len(pixels), -1)[:, 5:8].astype(np.float32)


class PixelExtractor(FeatureExtractor):
    """The first pixels are the features."""

    def __init__(self, name="inception", dims=None):
        self.name = self.identity = name
        self.dims = dims or {"pool": 5, "spatial": 3}

    def features(self, pixels):
        return {"pool": pool(pixels), "spatial": spatial(pixels)}


EXTRACTOR = PixelExtractor()
ARRAYS = {
    "mu": pool(PIXELS).mean(axis=0),
    "sigma": np.cov(pool(PIXELS), rowvar=False),
    "mu_s": spatial(PIXELS).mean(axis=0),
    "sigma_s": np.cov(spatial(PIXELS), rowvar=False),
    "arr_0": PIXELS,
    "feats": pool(PIXELS),
}


def write(path, *names, **arrays):
    np.savez(path, **{name: ARRAYS[name] for name in names}, **arrays)
    return path


def load(path):
    return ReferenceStatistics.load(path, EXTRACTOR)


def _load(path):
    return load(path).pool


def assert_whole(statistics):
    for gaussian, kind in ((statistics.pool, pool), (statistics.spatial, spatial)):
        expected = Moments.of(kind(PIXELS)).gaussian()
        assert frechet_distance(gaussian, expected) == pytest.approx(0, abs=1e-6)
    np.testing.assert_array_equal(statistics.features, pool(PIXELS))


def test_reference_batch_of_the_adm_suite(tmp_path):
    """Its statistics are those of more images than it holds, so they are not computed again."""
    path = write(
        tmp_path / "adm.npz",
        "mu_s",
        "sigma_s",
        "arr_0",
        mu=ARRAYS["mu"] + 1,
        sigma=2 * ARRAYS["sigma"],
    )
    known = load(path)
    np.testing.assert_allclose(known.pool.mean, ARRAYS["mu"] + 1, rtol=EXACT)
    assert known.pool.covariance.dtype == np.float64 and known.features is None
    assert has_images(path)
    known = known.with_images(EXTRACTOR.features(PIXELS))
    np.testing.assert_allclose(known.pool.covariance, 2 * ARRAYS["sigma"], rtol=EXACT)
    np.testing.assert_array_equal(known.features, pool(PIXELS))


def test_statistics_alone_serve_the_distance_alone(tmp_path):
    path = write(tmp_path / "clean.npz", "mu", "sigma")
    known = load(path)
    assert known.spatial is None and known.features is None and not has_images(path)


def test_images_alone_serve_everything(tmp_path):
    path = write(tmp_path / "samples.npz", "arr_0")
    known = load(path)
    assert known.pool is None and has_images(path)
    assert_whole(known.with_images(EXTRACTOR.features(PIXELS)))


def test_saved_statistics_are_read_back_for_their_features_only(tmp_path):
    path = tmp_path / "cache.npz"
    ReferenceStatistics.of(EXTRACTOR.features(PIXELS)).save(path, "inception")
    assert_whole(load(path))
    with pytest.raises(ValueError, match="holds features of inception, expected vgg16"):
        ReferenceStatistics.load(path, PixelExtractor("vgg16"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("mu",), "holds mu without the other of mu and sigma"),
        (("mu_s", "sigma_s"), "lacks mu and sigma, and arr_0"),
        (("mu", "sigma", "feats"), r"holds mu \(5,\) and sigma \(5, 5\); the pool features of"),
        (("feats",), r"holds feats \(40, 5\); the pool features of inception have 6 numbers"),
    ],
)
def test_files_that_do_not_fit_are_one_line(tmp_path, names, message):
    wide = "feats" in names
    extractor = PixelExtractor(dims={"pool": 6} if wide else None)
    with pytest.raises(ValueError, match=message) as caught:
        ReferenceStatistics.load(write(tmp_path / "a.npz", *names), extractor)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"text", b"PK\x03\x04 cut short"])
def test_unreadable_files_are_one_line(tmp_path, content):
    path = tmp_path / "a.npz"
    if content is not None:
        path.write_bytes(content)
    for read in (load, NpzImages):
        with pytest.raises(ValueError, match=r"a\.npz is not a readable \.npz") as caught:
            read(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [("mu", "sigma"), ("arr_0",)])
def test_any_flipped_bit_of_a_compressed_file_is_one_line_or_the_same(tmp_path, names):
    path = tmp_path / "reference.npz"
    np.savez_compressed(path, **{name: ARRAYS[name] for name in names})
    right = path.read_bytes()
    load = (lambda: NpzImages(path).read(0, 40)) if names == ("arr_0",) else (lambda: _load(path))
    expected = load()
    for place in range(0, len(right), max(1, len(right) // FLIPS)):
        path.write_bytes(right[:place] + bytes([right[place] ^ 4]) + right[place + 1 :])
        found, line = outcome(load)
        assert line or all(map(np.array_equal, found, expected)), place


def test_images_are_read_in_pieces(tmp_path):
    images = NpzImages(write(tmp_path / "a.npz", "arr_0"))
    assert images.shape == PIXELS.shape and len(images) == 40 and images.size == (4, 4)
    for first, stop in ((0, 16), (16, 40), (3, 5)):
        np.testing.assert_array_equal(images.read(first, stop), PIXELS[first:stop])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"other": PIXELS}, "lacks the array arr_0"),
        ({"arr_0": PIXELS / 255}, r"arr_0 is float64 \(40, 4, 4, 3\), expected uint8"),
        ({"arr_0": PIXELS[..., 0]}, r"arr_0 is uint8 \(40, 4, 4\), expected uint8"),
    ],
)
def test_other_arrays_are_no_images(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        NpzImages(write(tmp_path / "a.npz", **arrays))


def test_images_that_end_too_early_are_one_line(tmp_path):
    pixels = np.tile(PIXELS, (10, 1, 1, 1))  # more than is read with the header
    path = write(tmp_path / "a.npz", arr_0=pixels)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(bytes(data))
    images = NpzImages(path)
    with pytest.raises(ValueError, match="is damaged or cut short"):
        images.read(0, 400)


@pytest.mark.parametrize("name", ["mu", "sigma", "sigma_s", "feats"])
def test_statistics_that_are_not_finite_are_refused_with_their_array(tmp_path, name):
    broken = ARRAYS[name].copy()
    broken.flat[1] = np.nan
    np.savez(tmp_path / "r.npz", **{**ARRAYS, name: broken})
    with pytest.raises(ValueError, match=rf"r\.npz: {name}: 1 of \d+ numbers are not finite"):
        load(tmp_path / "r.npz")


def test_distance_of_moments_that_are_not_finite_is_none():
    good = Moments.of(pool(PIXELS)).gaussian()
    for name in ("mean", "covariance"):
        broken = good._replace(**{name: getattr(good, name) * np.nan})
        for pair, place in (((good, broken), "second"), ((broken, good), "first")):
            with pytest.raises(ValueError, match=f"{name} of the {place} distribution: "):
                frechet_distance(*pair)
