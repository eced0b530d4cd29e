"""Training ends where the held-out loss no longer falls, once and for all."""

import json

import pytest

from dar_jax.training import patience
from dar_jax.training.config import TrainConfig
from tests.modes import train_test

FALLING, FLAT = [3.0, 2.0, 1.0, 0.5], [3.0, 2.0, 2.0, 2.5]


@pytest.mark.parametrize(
    ("losses", "times", "ended"),
    [
        (FALLING, 2, False),
        (FLAT, 2, True),
        (FLAT, 3, False),
        (FLAT, 0, False),
        ([1.0, 2.0, 3.0, 0.9], 2, False),
        ([1.0], 1, False),
        ([1.0, float("nan"), float("nan")], 2, True),
        ([float("nan"), 1.0, 2.0, 3.0], 2, True),
        ([float("nan"), 2.0, 1.0], 2, False),
        ([], 1, False),
    ],
)
def test_losses_that_fall_no_more_end_a_run(tmp_path, losses, times, ended):
    lines = [json.dumps({"step": i, "eval/loss": loss}) for i, loss in enumerate(losses, 1)]
    other = json.dumps({"step": 1, "train/loss": 9.0})
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, other]))
    config = TrainConfig(steps=100, image_every=5, patience=times)
    assert patience.has_ended(tmp_path, config, step=10, since=0) == ended
    assert patience.has_ended(tmp_path, config, step=100, since=0)
    assert not patience.has_ended(tmp_path, config, step=11, since=0), "between two looks"


def test_losses_before_a_term_begins_do_not_count(tmp_path):
    losses = [1.0, 0.5, 3.0, 2.0, 1.5, 1.6, 1.7]  # of the third look on with one term more
    lines = [json.dumps({"step": i, "eval/loss": loss}) for i, loss in enumerate(losses, 1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    config = TrainConfig(steps=100, image_every=1, patience=2)
    found = [patience.has_ended(tmp_path, config, step, since=3) for step in range(1, 8)]
    assert found == [False] * 6 + [True]


def test_run_that_learns_nothing_ends_early_and_stays_so(tmp_path, monkeypatch):
    def make_config(*arguments, **train_block):
        config = original(*arguments, **train_block)
        config.optimizer.learning_rate = 0.0
        return config

    original = train_test.make_config
    monkeypatch.setattr(train_test, "make_config", make_config)
    for _ in range(2):
        train_test.run(tmp_path, steps=9, image_every=1, patience=2)
        curve = train_test.read_curve(tmp_path)
        assert [line["step"] for line in curve if "eval/loss" in line] == [1, 2, 3]
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        assert config["step"] == 3
    assert (tmp_path / "checkpoints" / "3").is_dir()


def test_patience_needs_looks():
    with pytest.raises(ValueError, match="patience=2 needs image_every"):
        TrainConfig(patience=2, image_every=0)
