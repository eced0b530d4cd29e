"""Checkpoints: the whole run comes back bitwise, and only for its own configuration."""

import jax
import numpy as np
import pytest

from dar_jax.data import pipeline
from dar_jax.data.sources import DataConfig
from dar_jax.parallel import sharding
from dar_jax.parallel.sharding import MeshConfig
from dar_jax.training.checkpoint import Checkpoints
from dar_jax.training.optimizer import OptimizerConfig
from dar_jax.training.state import TrainState, abstract_state, create_state
from tests.training.toy_task import ToyTask

DATA = DataConfig(source="synthetic", image_size=8, batch_size=16)
CONFIG = {"task": "toy", "data": {"batch_size": 16, "sizes": (1, 2)}}
REPORT = {"metrics": [1.5, [2, 3]], "written": {"bytes": 7, "sha256": "ab"}}


def _state(mesh, optimizer):
    return create_state(ToyTask(), optimizer, jax.random.key(3), mesh=mesh)


@pytest.mark.parametrize(
    ("config", "num_devices", "ema_decay"),
    [
        (MeshConfig(data=4, fsdp=2), 8, 0.0),
        (MeshConfig(data=1, fsdp=2, tensor=2), 4, 0.9),
        (MeshConfig(), 1, 0.9),
    ],
)
def test_state_and_iterator_come_back_on_another_mesh(tmp_path, config, num_devices, ema_decay):
    optimizer = OptimizerConfig(ema_decay=ema_decay)
    saved = _state(sharding.make_mesh(MeshConfig(data=1, fsdp=8)), optimizer)
    saved = saved.replace(step=saved.step + 3)
    iterator = pipeline.train_iterator(DATA, seed=0)
    for _ in range(3):
        next(iterator)
    checkpoints = Checkpoints(tmp_path / "checkpoints", CONFIG, keep=2)
    checkpoints.save(saved, 3, iterator, REPORT)
    expected = next(iterator)
    checkpoints.close()

    checkpoints = Checkpoints(tmp_path / "checkpoints", CONFIG, keep=2)
    fresh = pipeline.train_iterator(DATA, seed=0)
    mesh = sharding.make_mesh(config, jax.devices()[:num_devices])
    restored, report = checkpoints.restore(abstract_state(ToyTask(), optimizer, mesh), fresh)
    checkpoints.close()
    assert report == REPORT
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    np.testing.assert_array_equal(jax.random.key_data(restored.rng), jax.random.key_data(saved.rng))
    jax.tree.map(np.testing.assert_array_equal, restored.replace(rng=None), saved.replace(rng=None))
    shards = restored.params["blocks"]["kernel"].addressable_shards
    assert (len(shards), shards[0].data.shape[2]) == (num_devices, 128 // mesh.shape["fsdp"])
    np.testing.assert_array_equal(next(fresh)["pixels"], expected["pixels"])


@pytest.mark.parametrize(("keep_every", "kept"), [(0, ["5", "6"]), (2, ["2", "4", "5", "6"])])
def test_only_the_latest_and_every_nth_are_kept(tmp_path, keep_every, kept):
    state = TrainState(np.int32(0), {"weights": np.ones(3)}, None, (), jax.random.key(0))
    checkpoints = Checkpoints(tmp_path, CONFIG, keep=2, keep_every=keep_every)
    for step in range(1, 7):
        checkpoints.save(state, step, pipeline.train_iterator(DATA, seed=0))
    assert checkpoints.describe_latest().endswith(str(tmp_path / "6"))
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**CONFIG, "task": "other"}, "task='toy', the config has 'other'"),
        (
            {**CONFIG, "data": {"batch_size": 32, "sizes": (1, 2)}},
            r"data\.batch_size=16, the config has 32",
        ),
        ({"task": "toy"}, r"data\.batch_size=16, the config has '\(absent\)'"),
    ],
)
def test_another_config_is_refused_and_nothing_is_written(tmp_path, config, message):
    state = _state(sharding.make_mesh(MeshConfig()), OptimizerConfig())
    checkpoints = Checkpoints(tmp_path, CONFIG, keep=2)
    checkpoints.save(state, 1, pipeline.train_iterator(DATA, seed=0))
    checkpoints.close()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match=message) as caught:
        Checkpoints(tmp_path, config, keep=2)
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_an_unfinished_save_is_ignored(tmp_path):
    state = _state(sharding.make_mesh(MeshConfig()), OptimizerConfig())
    checkpoints = Checkpoints(tmp_path, CONFIG, keep=3)
    for step in (1, 2):
        checkpoints.save(state, step, pipeline.train_iterator(DATA, seed=0))
    checkpoints.close()
    (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")
    checkpoints = Checkpoints(tmp_path, CONFIG, keep=3)
    assert checkpoints.latest_step == 1
    # It may be in the making as long as no later one is complete.
    assert (tmp_path / "2.orbax-checkpoint-tmp").exists()
    checkpoints.save(state, 3, pipeline.train_iterator(DATA, seed=0))
    checkpoints.close()
    Checkpoints(tmp_path, CONFIG, keep=3).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


def test_checkpoint_older_than_a_key_holds_to_its_default(tmp_path):
    state = _state(sharding.make_mesh(MeshConfig()), OptimizerConfig())
    checkpoints = Checkpoints(tmp_path, CONFIG, keep=2)
    checkpoints.save(state, 1, pipeline.train_iterator(DATA, seed=0))
    checkpoints.close()
    newer = {**CONFIG, "data": {**CONFIG["data"], "flip": False}}
    defaults = {"data": {"flip": False}}
    Checkpoints(tmp_path, newer, keep=2, defaults=defaults).close()
    newer["data"]["flip"] = True
    with pytest.raises(ValueError, match=r"data\.flip=False, the config has True"):
        Checkpoints(tmp_path, newer, keep=2, defaults=defaults)
