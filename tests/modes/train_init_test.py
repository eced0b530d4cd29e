"""Runs that start from the parameters of another model."""

import jax
import numpy as np
import pytest

from dar_jax.common import model_dir
from dar_jax.config import build as read_config
from dar_jax.modes import train
from tests.modes import train_test
from tests.training.toy_task import ToyTask


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    path = tmp_path_factory.mktemp("half")
    train_test.run(path, steps=2)
    return path


def test_new_run_starts_from_the_parameters_of_a_model(half, tmp_path):
    config = train_test.make_config(steps=1, init_from=str(half), log_every=1, checkpoint_every=1)
    config.optimizer = {"learning_rate": 0.0, "ema_decay": 0.0}
    train.train(read_config(config), str(tmp_path), ToyTask())
    _, expected = model_dir.load_model(half / "model")
    state, _ = train_test.restored(tmp_path, 1)
    jax.tree.map(np.testing.assert_array_equal, state["params"], expected)


def test_what_does_not_fit_is_drawn_anew_and_listed(half, tmp_path, caplog):
    task = ToyTask(image_size=4)
    config = train_test.make_config(steps=1, init_from=str(half), log_every=1, checkpoint_every=1)
    config.data.image_size = 4
    config.optimizer = {"learning_rate": 0.0, "ema_decay": 0.0}
    with caplog.at_level("INFO", logger="absl"):
        train.train(read_config(config), str(tmp_path), task)
    (block,) = (text for text in caplog.messages if "drawn anew" in text)
    assert block.splitlines()[1:] == [
        "set otherwise:",
        "  image_size 4, there 8",
        "drawn anew:",
        "  input/kernel (48, 128), there (192, 128)",
        "  output/kernel (128, 48), there (128, 192)",
    ]
    _, expected = model_dir.load_model(half / "model")
    state, _ = train_test.restored(tmp_path, 1)
    np.testing.assert_array_equal(state["params"]["blocks"]["kernel"], expected["blocks"]["kernel"])
    assert np.std(state["params"]["output"]["kernel"]) > 0


def test_another_architecture_is_refused_in_one_line(half, tmp_path):
    with pytest.raises(
        ValueError, match=r"another architecture: 0% .* lacking are blocks/bias \(2, 64\), there"
    ) as c:
        train_test.run(
            tmp_path / "new", steps=1, task=ToyTask(width=64), init_from=str(half / "model")
        )
    assert "\n" not in str(c.value)
    assert not (tmp_path / "new").exists()


def test_run_that_goes_on_from_another_start_is_refused(half):
    with pytest.raises(ValueError, match=r"train\.init_from='', the config has '.*half") as caught:
        train_test.run(half, steps=4, init_from=str(half / "model"))
    assert "--config.train.allow_change=train.init_from" in str(caught.value)


def test_export_writes_the_model_of_a_run_that_is_not_over(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "build_task", lambda _: ToyTask())
    config = read_config(train_test.make_config(steps=4))
    with pytest.raises(ValueError, match="holds no checkpoint to export: train first"):
        train.export(config, str(tmp_path / "run"))
    train_test.run(tmp_path / "run", steps=2)
    (tmp_path / "run" / "model").rename(tmp_path / "expected")
    train.export(config, str(tmp_path / "run"))
    exported, params = model_dir.load_model(tmp_path / "run" / "model")
    assert exported["step"] == 2
    jax.tree.map(
        np.testing.assert_array_equal, params, model_dir.load_model(tmp_path / "expected")[1]
    )
