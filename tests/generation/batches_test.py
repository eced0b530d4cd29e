"""Batches of images: labels that a command names, and what the images depend on."""

import pytest

from dar_jax.generation import batches
from dar_jax.generation.batches import classes_of
from dar_jax.generation.config import SampleConfig
from tests.damage import warnings

NAMES = ("0", "10", "2")


@pytest.mark.parametrize(
    ("labels", "classes"), [((0,), (0,)), (("2", "0,10"), (2, 0, 1)), ((1,), (1,))]
)
def test_labels_are_classes_by_name_or_number(labels, classes, caplog):
    with warnings(caplog) as lines:
        assert classes_of(3, NAMES, SampleConfig(labels=labels)) == classes
    assert lines == []


def test_number_that_is_the_name_of_another_class_is_told(caplog):
    with warnings(caplog) as lines:
        assert classes_of(3, ("0", "2", "10"), SampleConfig(labels=(2,))) == (2,)
    (line,) = lines
    assert "2 is taken as the number" in line and line.endswith(
        """number 1, write it in quotes: "'2'\""""
    )
    with pytest.raises(ValueError, match="10 is not a class"):
        classes_of(3, NAMES, SampleConfig(labels=(10,)))


def test_settings_of_jax_that_draw_other_images_are_told_apart(monkeypatch):
    """The tests have the defaults; with others, those would be unusual."""
    assert batches.unusual_settings() == {}
    monkeypatch.setitem(batches.JAX_DEFAULTS, "jax_enable_x64", True)
    assert batches.unusual_settings() == {"jax_enable_x64": False}
