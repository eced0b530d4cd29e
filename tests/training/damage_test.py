"""Damaged checkpoints: the newest whole one is used, the others are named and set aside."""

import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from dar_jax.data import pipeline
from dar_jax.data.sources import DataConfig
from dar_jax.training.checkpoint import Checkpoints
from dar_jax.training.state import TrainState
from tests.damage import DAMAGES, damage, outcome, warnings
from tests.modes import train_test

CONFIG = {"task": "toy"}
WEIGHTS = {1: np.arange(64, dtype=np.float32), 2: np.arange(64, dtype=np.float32) + 0.5}
SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])
RUN_FILES = 12
"""Files of a run outside its checkpoints that the long test reaches at least."""


def state_of(step):
    return TrainState(np.int32(step), {"weights": WEIGHTS[step]}, None, (), jax.random.key(0))


def iterator():
    return pipeline.train_iterator(DataConfig(source="synthetic", image_size=8), seed=0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("made")
    checkpoints = Checkpoints(directory, CONFIG, keep=3)
    for step in WEIGHTS:
        checkpoints.save(state_of(step), step, iterator())
    checkpoints.close()
    return directory


def restore(directory):
    """Return the step and the weights that a run would go on from."""
    checkpoints = Checkpoints(directory, CONFIG, keep=3)
    try:
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SHARDING),
            jax.tree.map(jax.numpy.asarray, state_of(1)),
        )
        state, _ = checkpoints.restore(abstract, iterator())
        return int(state.step), np.asarray(state.params["weights"])
    finally:
        checkpoints.close()


def check_damage(made, where, name, how, caplog):
    directory = pathlib.Path(shutil.copytree(made, where))
    if not damage(directory / "2" / name, how):
        return
    with warnings(caplog) as told:
        step, weights = restore(directory)
    np.testing.assert_array_equal(weights, WEIGHTS[step])
    if step == 1:
        assert any("damaged and set aside" in text and "step 2" in text for text in told)
        assert (directory / "2-0.damaged").is_dir() and not (directory / "2").exists()


def names_of(directory):
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


def test_a_whole_checkpoint_verifies(made, tmp_path):
    assert restore(shutil.copytree(made, tmp_path / "copy"))[0] == 2


def test_damaged_checkpoint_is_set_aside(made, tmp_path, caplog):
    """Every file in one way; the long test has all of them."""
    for number, name in enumerate(names_of(made / "2")):
        how = list(DAMAGES)[number % len(DAMAGES)]
        check_damage(made, tmp_path / str(number), name, how, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("how", DAMAGES)
def test_any_damage_of_any_file_is_noticed_or_harmless(made, tmp_path, caplog, how):
    for number, name in enumerate(names_of(made / "2")):
        check_damage(made, tmp_path / str(number), name, how, caplog)


def test_flipped_weights_are_never_restored(made, tmp_path, caplog):
    copy = pathlib.Path(shutil.copytree(made, tmp_path / "copy"))
    files = (path for path in (copy / "2" / "state").rglob("*") if path.is_file())
    largest = max(files, key=lambda path: path.stat().st_size)
    damage(largest, "flipped")
    assert restore(copy)[0] == 1


def test_all_damaged_is_one_line_and_changes_nothing(made, tmp_path):
    copy = pathlib.Path(shutil.copytree(made, tmp_path / "copy"))
    for step in WEIGHTS:
        (copy / str(step) / "config" / "metadata").write_text("")
    with pytest.raises(ValueError, match=r"damaged: step 2, config/metadata is empty; step 1") as e:
        restore(copy)
    assert "\n" not in str(e.value) and sorted(p.name for p in copy.iterdir()) == ["1", "2"]


@pytest.mark.parametrize("name", ["old", "2 (copy)", "2.bak", "copy_of_9", "-5", "007"])
def test_stray_folders_are_passed_over(made, tmp_path, name):
    copy = pathlib.Path(shutil.copytree(made, tmp_path / "copy"))
    shutil.copytree(copy / "1", copy / name)
    assert restore(copy)[0] == 2 and (copy / name).is_dir()


@pytest.mark.parametrize("make", [pathlib.Path.touch, lambda path: path.symlink_to("nowhere")])
def test_checkpoints_that_are_no_folder_are_refused_before_anything_is_written(tmp_path, make):
    make(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="checkpoints is no folder for checkpoints; move it away"):
        Checkpoints(tmp_path / "checkpoints", CONFIG, keep=3)


def test_checkpoint_with_the_name_of_another_step_is_refused(made, tmp_path):
    copy = pathlib.Path(shutil.copytree(made, tmp_path / "copy"))
    shutil.copytree(copy / "2", copy / "30")
    with pytest.raises(ValueError, match=r"30 is the checkpoint of step 2: give it that name, or"):
        restore(copy)


def test_empty_folder_and_file_with_the_name_of_a_step(made, tmp_path):
    copy = pathlib.Path(shutil.copytree(made, tmp_path / "copy"))
    (copy / "9").mkdir()
    (copy / "8").write_text("")
    assert restore(copy)[0] == 2


def test_checkpoint_without_digests_is_taken_as_it_is(made, tmp_path, caplog):
    copy = pathlib.Path(shutil.copytree(made, tmp_path / "copy"))
    (copy / "2" / "digests.json").unlink()
    with warnings(caplog) as told:
        assert restore(copy)[0] == 2
    assert any("no digests" in text for text in told)


@pytest.mark.slow
@pytest.mark.parametrize("how", DAMAGES)
def test_every_file_of_a_workdir(tmp_path, caplog, how):
    """No traceback, and no silent difference: the same run, a warning, or one line."""
    whole, half = tmp_path / "whole", tmp_path / "half"
    train_test.run(whole, steps=4)
    train_test.run(half, steps=2)
    names = [name for name in names_of(half) if not name.startswith("checkpoints/")]
    assert len(names) + 1 >= RUN_FILES // 2
    for number, name in enumerate(names):
        copy = pathlib.Path(shutil.copytree(half, tmp_path / str(number)))
        if not damage(copy / name, how):
            continue
        with warnings(caplog) as told:
            _, refusal = outcome(functools.partial(train_test.run, copy, steps=4))
        if refusal:
            continue
        assert (copy / "model" / "model.safetensors").read_bytes() == (
            whole / "model" / "model.safetensors"
        ).read_bytes(), name
        lost = train_test.read_curve(copy) != train_test.read_curve(whole)
        assert not lost or told or how == "deleted" or name == "metrics.jsonl", (name, told)
        assert json.loads((copy / "config.json").read_text())["seed"] == 0
