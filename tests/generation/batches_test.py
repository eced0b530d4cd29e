"""Batches of images: labels that a command names, and what the images depend on."""

import numpy as np
import pytest

from dar_jax.common.model_dir import save_model
from dar_jax.generation import batches
from dar_jax.generation.batches import classes_of, model_path
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


@pytest.mark.parametrize(
    "given",
    [
        dict(num_images=4, prefix_image="a.png"),
        dict(num_images=4, inpaint_image="a.png", inpaint_mask="b.png"),
        dict(originals=("a.png",), num_images=4),
        dict(originals=("a.png",), prefix_image="a.png"),
    ],
)
def test_what_is_drawn_by_itself_is_asked_for_by_itself(given):
    with pytest.raises(ValueError, match="=.* and .*=.* are drawn one at a time"):
        SampleConfig(**given)
    SampleConfig(prefix_image="a.png", inpaint_image="a.png", inpaint_mask="b.png")


@pytest.mark.parametrize(("step", "is_told"), [(3, True), (8, False)])
def test_model_that_training_has_left_behind_is_told(tmp_path, caplog, step, is_told):
    save_model(tmp_path / "model", "dar_prior", {}, {"x": np.zeros(1)}, {"step": step})
    (tmp_path / "checkpoints" / "8").mkdir(parents=True)
    with warnings(caplog) as told:
        assert model_path(SampleConfig(), str(tmp_path)) == str(tmp_path / "model")
    assert ["is of step 3, and training has reached step 8" in text for text in told] == [
        True
    ] * is_told
