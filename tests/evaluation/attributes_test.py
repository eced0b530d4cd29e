"""Judges of what prompts say: what they read in captions, and that they know it on sight."""

import numpy as np
import pytest
from PIL import Image

from dar_jax.data.base import DataConfig
from dar_jax.evaluation.attributes import AttributeJudges, read_attributes, values_of

pytest.importorskip("sklearn")
COLOURS = {"red": (200, 30, 30), "light-red": (250, 190, 190), "blue": (30, 30, 200)}
ATTRIBUTES = read_attributes("colour=red|light-red|blue; shape = square | bar")


def picture(colour, shape, rng):
    pixels = np.full((12, 12, 3), 255, np.uint8)
    top, left = rng.integers(0, 3, 2)
    height, width = {"square": (6, 6), "bar": (3, 9)}[shape]
    pixels[top : top + height, left : left + width] = COLOURS[colour]
    return pixels


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    for number in range(120):
        colour, shape = list(COLOURS)[number % 3], ("square", "bar")[number // 3 % 2]
        Image.fromarray(picture(colour, shape, rng)).save(root / f"{number}.png")
        said = "a thing" if number > 110 else f"A {colour} {shape}, not a redder one"
        (root / f"{number}.txt").write_text(said)
    return DataConfig(
        source="folder", path=str(root), image_size=12, captions=True, test_fraction=0.2
    )


def test_values_are_whole_words_of_one_only():
    values = ["red", "light-red", "man"]
    captions = ["a Red one", "light-red", "reddish woman", "man, red", "the man: x", ""]
    assert values_of(captions, values).tolist() == [0, 1, -1, -1, 2, -1]
    assert values_of([], values).tolist() == []


def test_judges_know_real_pictures_and_tell_wrong_ones(data):
    judges = AttributeJudges(ATTRIBUTES, data)
    assert judges.on_real == {"colour_accuracy_on_real": 1.0, "shape_accuracy_on_real": 1.0}
    rng = np.random.default_rng(1)
    drawn = np.stack([picture("red", "bar", rng), picture("blue", "bar", rng)])
    found = judges.metrics(drawn, ["a red square", "a blue thing"])
    assert found == {"colour_accuracy": 1.0, "shape_accuracy": 0.0}
    assert judges.metrics(drawn, ["?", "?"]) == {}


@pytest.mark.parametrize("text", ["colour", "=a|b", "colour=red", "colour=red|", "a=b|b"])
def test_what_names_no_attribute_is_one_line(text):
    with pytest.raises(ValueError, match="attributes: '.*' is not of the form name=one|two"):
        read_attributes(text)


def test_values_that_captions_lack_are_refused(data):
    with pytest.raises(ValueError, match=r"fewer than two of mood=glad\|sad are in the captions"):
        AttributeJudges(read_attributes("mood=glad|sad"), data)
