"""The comparison itself: a parity suite that cannot fail proves nothing."""

import json

import numpy as np
import pytest

from tests.golden import fixtures

FOLDERS = sorted(
    path.parent.relative_to(fixtures.ROOT).as_posix()
    for path in fixtures.ROOT.glob("*/*/arrays.json")
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(fixtures, "ROOT", tmp_path)
    arrays = {"x": np.zeros(3), "y": np.ones((2, 2), np.float32), "codes": np.arange(4)}
    spec = {
        "x": {"role": "input"},
        "y": {"role": "output", "atol": 0.1},
        "codes": {"role": "exact"},
    }
    (tmp_path / "part").mkdir()
    np.savez(tmp_path / "part" / "io.npz", **arrays)
    (tmp_path / "part" / "arrays.json").write_text(json.dumps({"io": spec}))
    return "part"


def test_compare_passes_when_everything_is_close(folder):
    with fixtures.Compare(folder) as golden:
        golden.check_all(y=np.full((2, 2), 1.05), codes=np.arange(4))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("y", np.full((2, 2), 1.2), "off by 0.2"),
        ("y", np.array([[1, 1], [1, np.nan]]), "off by nan"),
        ("y", np.ones((1, 2)), "has shape"),
        ("codes", np.array([0, 1, 2, 4]), "differs in 1 of 4"),
        ("x", np.zeros(3), "is an input"),
    ],
)
def test_compare_rejects(folder, name, value, message):
    with pytest.raises(AssertionError, match=message):
        fixtures.Compare(folder).check(name, value)


def test_compare_insists_on_every_array(folder):
    golden = fixtures.Compare(folder)
    golden.check("y", np.ones((2, 2)))
    with pytest.raises(AssertionError, match="not compared: codes"):
        golden.finish()


def test_recipe_is_stable():
    weights = fixtures.load_state_dict("dar/discriminator")
    kernel = weights["main.0.weight"]
    assert kernel.shape == (8, 3, 4, 4)
    stored = np.array(
        [0.06347902119159698, -0.018048135563731194, 0.2810174822807312], np.float32
    )  # from the original weight file
    np.testing.assert_array_equal(kernel.ravel()[:3], stored)


def test_other_seeding_is_that_of_the_original():
    folder = "transdiff/kl_vae_groups32"
    weights = fixtures.load_state_dict(folder)
    checks = fixtures.load_json(folder, "config")["weights_check"]
    assert len(checks) == 5
    for name, check in checks.items():
        array = weights[name].astype(np.float64)
        np.testing.assert_array_equal(array.ravel()[:3], check["head"])
        assert np.sum(array**2) == pytest.approx(check["sumsq"], rel=1e-12)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_lists_its_arrays(folder):
    for io_name in fixtures.load_json(folder, "arrays").keys() - {"draws"}:
        assert fixtures.Compare(folder, io_name).arrays
