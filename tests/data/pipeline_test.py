"""Input pipeline: order, epochs, shards, restoring."""

import dataclasses
import pathlib
import types

import numpy as np
import pytest

from dar_jax.data import embedded, pipeline, sources
from dar_jax.data.folder import FolderSource
from dar_jax.data.sources import DataConfig
from tests.damage import warnings

CONFIG = DataConfig(source="synthetic", image_size=4, batch_size=16, num_threads=2)
NUM_PICTURES = 96
BATCHES_PER_EPOCH = NUM_PICTURES // CONFIG.batch_size


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    monkeypatch.setattr(embedded, "SYNTHETIC_SIZE", NUM_PICTURES)


def _take(iterator, count):
    return [next(iterator)["pixels"] for _ in range(count)]


def _keys(batches):
    return [picture.tobytes() for batch in batches for picture in batch]


def test_batches_have_the_contracted_types():
    batch = next(pipeline.train_iterator(CONFIG, seed=0))
    assert batch["pixels"].shape == (16, 4, 4, 3) and batch["pixels"].dtype == np.uint8
    assert batch["label"].shape == (16,) and batch["label"].dtype == np.int32


def test_every_epoch_visits_each_picture_once_in_a_new_order():
    iterator = pipeline.train_iterator(CONFIG, seed=0)
    first = _keys(_take(iterator, BATCHES_PER_EPOCH))
    second = _keys(_take(iterator, BATCHES_PER_EPOCH))
    assert len(set(first)) == NUM_PICTURES
    assert set(first) == set(second) and first != second


def test_order_depends_on_the_seed_alone():
    first, again, other = (
        _keys(_take(pipeline.train_iterator(CONFIG, seed), 3)) for seed in (1, 1, 2)
    )
    assert first == again and first != other


def test_padding_moves_training_examples_by_record_and_leaves_evaluation_alone():
    config = dataclasses.replace(CONFIG, padding=1)
    iterator = pipeline.train_iterator(config, seed=0)
    first, second = (_take(iterator, BATCHES_PER_EPOCH) for _ in range(2))
    still = pipeline.train_iterator(CONFIG, seed=0)
    for moved, original in zip(np.concatenate(first), np.concatenate(_take(still, 6)), strict=True):
        padded = np.pad(original, ((1, 1), (1, 1), (0, 0)), "edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, original.shape)
        assert (moved == windows.reshape(9, *original.shape)).all(axis=(1, 2, 3)).any()
    assert len(set(_keys(first)) & set(_keys(second))) < NUM_PICTURES / 2  # drawn anew: 1 in 9
    fresh = pipeline.train_iterator(config, seed=0)
    fresh.set_state({"next_index": BATCHES_PER_EPOCH})
    np.testing.assert_array_equal(_take(fresh, BATCHES_PER_EPOCH), second)
    for moved, original in zip(
        pipeline.eval_batches(config, "test"), pipeline.eval_batches(CONFIG, "test"), strict=True
    ):
        np.testing.assert_array_equal(moved["pixels"], original["pixels"])


def test_negative_padding_is_refused():
    with pytest.raises(ValueError, match="padding -1 is negative"):
        dataclasses.replace(CONFIG, padding=-1)


def test_restored_iterator_continues_where_it_was():
    iterator = pipeline.train_iterator(CONFIG, seed=0)
    _take(iterator, 5)
    state = iterator.get_state()
    expected = _take(iterator, BATCHES_PER_EPOCH)
    fresh = pipeline.train_iterator(CONFIG, seed=0)
    fresh.set_state(state)
    np.testing.assert_array_equal(_take(fresh, BATCHES_PER_EPOCH), expected)


def test_share_of_waiting_leaves_the_first_batch_out(monkeypatch):
    clock = types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(pipeline, "time", clock)

    def batches():
        for seconds in (100.0, 3.0, 1.0, 2.0, 6.0):
            clock.now += seconds
            yield {}

    iterator = pipeline.train_iterator(CONFIG, seed=0)
    monkeypatch.setattr(iterator, "_open", batches)
    next(iterator)
    for _ in range(2):  # steps of 6 seconds
        next(iterator)
        clock.now += 6
    assert iterator.take_wait() == (2.0, 4 / 16)
    for _ in range(2):
        next(iterator)
    assert iterator.take_wait() == (4.0, 1.0)


@pytest.mark.parametrize(
    ("cores", "options", "expected"),
    [
        (2, {}, "all cores read; --mode=cache"),
        (4, {}, "raise config.data.num_threads=2 to 4"),
        (16, {}, "raise config.data.num_workers=0, e.g. to 8"),  # of arrays, `auto` takes none
        (16, {"num_workers": 8}, "raise config.data.num_threads=2 to 16"),
        (16, {"num_workers": 8, "num_threads": 16}, "all cores read; --mode=cache"),
    ],
)
def test_advice_is_what_the_cores_allow(cores, options, expected):
    iterator = pipeline.train_iterator(dataclasses.replace(CONFIG, **options), seed=0)
    assert iterator.advice(cores).startswith(expected)


@pytest.mark.parametrize(
    ("cores", "wanted", "expected"),
    [(2, "auto", 0), (4, "auto", 0), (16, "auto", 8), (200, "auto", 16), (2, "3", 3), (16, 0, 0)],
)
def test_processes_decode_pictures_where_there_are_cores(cores, wanted, expected):
    config = dataclasses.replace(CONFIG, num_workers=wanted)
    pictures = FolderSource(pathlib.Path(), ("a.jpg",), (0,), ("a",))
    assert pipeline.num_workers(config, pictures, cores) == expected
    if wanted == "auto":
        assert pipeline.num_workers(config, sources.load_source(CONFIG, "train"), cores) == 0


def test_parts_of_a_batch_are_the_same_for_any_number_of_parts():
    whole = pipeline.train_iterator(CONFIG, seed=0)
    parts = [pipeline.train_iterator(CONFIG, 0, (index, 4)) for index in range(4)]
    for _ in range(BATCHES_PER_EPOCH + 2):
        found = np.concatenate([next(part)["pixels"] for part in parts])
        np.testing.assert_array_equal(found, next(whole)["pixels"])


def test_state_restores_into_another_number_of_parts():
    whole = pipeline.train_iterator(CONFIG, seed=0)
    _take(whole, BATCHES_PER_EPOCH + 3)
    halves = [pipeline.train_iterator(CONFIG, 0, (index, 2)) for index in range(2)]
    for half in halves:
        half.set_state(whole.get_state())
    expected = _take(whole, 3)
    found = [np.concatenate(pair) for pair in zip(*(_take(h, 3) for h in halves), strict=True)]
    np.testing.assert_array_equal(found, expected)


def test_batches_of_one_are_read_without_a_warning(caplog):
    config = dataclasses.replace(CONFIG, batch_size=1, num_threads=16)
    with warnings(caplog) as told:
        next(pipeline.train_iterator(config, seed=0))
        next(pipeline.eval_batches(config, "test"))
    assert told == []


def test_batch_that_does_not_divide_over_processes_is_refused():
    with pytest.raises(ValueError, match="batch_size 16 .* 3 processes; use a multiple of 3"):
        pipeline.train_iterator(CONFIG, 0, (0, 3))


def test_eval_batches_cover_the_split_in_order_with_a_short_last_one():
    config = DataConfig(source="synthetic", image_size=4, batch_size=20)
    batches = [batch["pixels"] for batch in pipeline.eval_batches(config, "test")]
    assert len(batches[-1]) == NUM_PICTURES % 20
    expected = sources.load_source(config, "test").pixels
    np.testing.assert_array_equal(np.concatenate(batches), expected)


class Latents:
    """Ten records, of which the fourth is not finite."""

    class_names = ("a",)
    num_classes = 1

    def __len__(self):
        return 10

    def name(self, index):
        return f"latent {index}"

    def __getitem__(self, index):
        moments = np.full((2, 1, 1, 2), np.nan if index == 3 else index, np.float32)
        return {"moments": moments, "label": np.int32(0)}

    def read(self, index):
        raise ValueError("no pictures")


@pytest.mark.parametrize(("part", "next_index"), [((0, 1), 0), ((1, 2), 0), ((0, 1), 3)])
def test_suspects_are_the_records_that_are_not_finite_or_all(part, next_index, monkeypatch):
    monkeypatch.setattr(pipeline, "load_source", lambda *_: Latents())
    config = dataclasses.replace(CONFIG, batch_size=4)
    iterator = pipeline.train_iterator(config, 0, part)
    iterator.set_state({**iterator.get_state(), "next_index": next_index})
    found = 0
    for number in range(next_index, next_index + 20):
        seen = {float(m.flat[0]) for m in next(iterator)["moments"]}
        bad = any(np.isnan(value) for value in seen)
        expected = ["latent 3"] if bad else sorted(f"latent {int(value)}" for value in seen)
        assert iterator.suspects(number) == expected
        found += bad
    assert 0 < found < 20
    iterator.close()
