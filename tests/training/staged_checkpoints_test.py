"""Checkpoints in s3://: what is complete in the bucket counts, whatever happens on the way."""

import os
import pathlib
import subprocess
import tempfile

import jax
import numpy as np
import pytest

from dar_jax.common import storage
from dar_jax.common.files import host
from dar_jax.data import pipeline
from dar_jax.data.sources import DataConfig
from dar_jax.modes import train
from dar_jax.training import checkpoint, staged_checkpoints
from dar_jax.training.checkpoint import Checkpoints
from dar_jax.training.state import TrainState
from tests.emulator import folder_in
from tests.modes import train_test

CONFIG = {"task": "toy"}
SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.fixture
def directory(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return folder_in(s3) / "checkpoints"


def state_of(step):
    weights = np.full(64, step, np.float32)
    return TrainState(np.int32(step), {"weights": weights}, None, (), jax.random.key(0))


def iterator():
    return pipeline.train_iterator(DataConfig(source="synthetic", image_size=8), seed=0)


def save(directory, *steps, **options):
    checkpoints = Checkpoints(directory, CONFIG, **{"keep": 3, **options})
    for step in steps:
        checkpoints.save(state_of(step), step, iterator())
    checkpoints.wait()
    checkpoints.close()


def restored(directory):
    """Return the weights that a run would go on from."""
    checkpoints = Checkpoints(directory, CONFIG, keep=3)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SHARDING),
        jax.tree.map(jax.numpy.asarray, state_of(1)),
    )
    state, _ = checkpoints.restore(abstract, iterator())
    checkpoints.close()
    return np.asarray(state.params["weights"])


def names(directory):
    return sorted(path.name for path in storage.entries(directory))


def test_what_is_saved_is_in_the_bucket_and_comes_back(directory, tmp_path):
    save(directory, 1, 2)
    assert names(directory) == ["1", "2"] and not [*tmp_path.iterdir()]
    assert checkpoint.latest_step(directory) == 2
    np.testing.assert_array_equal(restored(directory), state_of(2).params["weights"])


@pytest.mark.parametrize(("keep_every", "kept"), [(0, ["5", "6"]), (2, ["2", "4", "5", "6"])])
def test_only_the_latest_and_every_nth_are_kept(directory, tmp_path, keep_every, kept):
    for steps in ((1, 2, 3), (4, 5), (6,)):  # of which the later runs have but the last one here
        save(directory, *steps, keep=2, keep_every=keep_every)
    assert names(directory) == kept


def test_save_is_over_when_the_bucket_has_it_and_fails_if_that_does(directory, monkeypatch):
    checkpoints = Checkpoints(directory, CONFIG, keep=3)
    checkpoints.save(state_of(2), 2, iterator())
    assert checkpoints.describe_latest() == f"the last good checkpoint is {directory}/2"
    upload, sent = storage.upload, []

    def full(source, target):
        sent.append(target.name)
        if len(sent) > 3:
            raise OSError("quota exceeded")
        upload(source, target)

    monkeypatch.setattr(storage, "upload", full)
    checkpoints.save(state_of(4), 4, iterator())
    with pytest.raises(ValueError, match=rf"saving to {directory} failed: quota exceeded; .*/2;"):
        checkpoints.wait()
    assert names(directory) == ["2", "4"] and checkpoints.latest_step == 2
    checkpoints.close()
    monkeypatch.undo()
    np.testing.assert_array_equal(restored(directory), state_of(2).params["weights"])
    assert names(directory) == ["2"]


def test_deletion_that_is_broken_off_leaves_no_checkpoint(directory, monkeypatch):
    save(directory, 1, 2, 3)
    monkeypatch.setattr(storage, "delete_tree", lambda path: None)
    save(directory, 4)
    assert names(directory) == ["1", "2", "3", "4"]
    assert staged_checkpoints.complete_steps(directory) == [4, 3, 2]
    monkeypatch.setattr(staged_checkpoints._Staged, "_delete", lambda self, step: None)
    save(directory, 5)
    assert staged_checkpoints.complete_steps(directory) == [5, 4, 3, 2]
    monkeypatch.undo()
    save(directory)
    assert names(directory) == ["3", "4", "5"]


def test_damaged_one_is_set_aside_and_saved_again(directory):
    save(directory, 1, 2)
    for number in range(2):
        (directory / "2" / "data" / "metadata").write_bytes(b"damaged")
        np.testing.assert_array_equal(restored(directory), state_of(1).params["weights"])
        assert f"2-{number}.damaged" in names(directory)
        save(directory, 2)
    np.testing.assert_array_equal(restored(directory), state_of(2).params["weights"])
    assert names(directory) == ["1", "2", "2-0.damaged", "2-1.damaged"]


def test_another_config_is_refused_and_nothing_is_deleted(directory):
    save(directory, 1, 2, 3)
    (directory / "2" / "digests.json").unlink()
    before = storage.objects([str(directory)])
    with pytest.raises(ValueError, match="task='toy', the config has 'other'"):
        Checkpoints(directory, {"task": "other"}, keep=1)
    assert storage.objects([str(directory)]) == before


def test_only_damaged_ones_are_refused(directory):
    save(directory, 1)
    (directory / "1" / "digests.json").write_text("[]")
    with pytest.raises(ValueError, match=f"all checkpoints in {directory} are damaged: step 1, "):
        Checkpoints(directory, CONFIG, keep=1)


def test_folders_of_processes_that_are_gone_are_deleted(directory, tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    folders = {
        f"{host()}-{dead.pid}-abc": False,
        f"{host()}-{os.getpid()}-abc": True,
        f"elsewhere-0123abcd-{dead.pid}-abc": True,
    }
    for name in folders:
        pathlib.Path(tmp_path, f"dar_jax-checkpoints-{name}", "8").mkdir(parents=True)
    save(directory, 1)
    left = {path.name.removeprefix("dar_jax-checkpoints-") for path in tmp_path.iterdir()}
    assert left == {name for name, stays in folders.items() if stays}


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_training_by_several_processes_is_refused_before_anything_is_read(scheme, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(train.sharding, "make_mesh", lambda config: 1 / 0)
    kind, message = ZeroDivisionError, "division"  # it went on
    if scheme == "s3":
        kind, message = ValueError, r"2 processes cannot train in s3://; use gs://.*mount-s3"
    with pytest.raises(kind, match=message):
        train_test.run(f"{scheme}://bucket/run", steps=2)
