"""Looks at a model in training: a run that ends after a save makes up for them, once."""

import json

import pytest

from dar_jax.training import looks, metrics
from dar_jax.training.config import TrainConfig
from dar_jax.training.looks import Missed, find_missed
from tests.modes import train_test

CONFIG = TrainConfig(steps=8, image_every=2, evaluate_every=4)
LOOK, EVALUATION = {"eval/loss": 1.0}, {"eval/generation/fid": 1.0}


def write(workdir, *lines):
    text = "".join(f"{json.dumps({'step': step, **values})}\n" for step, values in lines)
    (workdir / metrics.FILE_NAME).write_text(text)


@pytest.mark.parametrize(
    ("step", "lines", "missed"),
    [
        (0, [], Missed()),
        (3, [], Missed()),
        (2, [(2, {"train/loss": 1.0})], Missed(look=True)),
        (2, [(2, LOOK)], Missed()),
        (4, [(2, LOOK)], Missed(look=True, evaluation=True)),
        (4, [(4, {"train/loss": 1.0}), (4, LOOK)], Missed(evaluation=True)),
        (4, [(4, LOOK), (4, EVALUATION)], Missed()),
    ],
)
def test_what_is_missed_shows_in_the_figures(step, lines, missed, tmp_path):
    write(tmp_path, *lines)
    assert find_missed(tmp_path, CONFIG, step) == missed


@pytest.mark.parametrize("exported", [2, 8])
def test_run_that_exported_its_model_has_missed_no_look(exported, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"step": exported}))
    assert find_missed(tmp_path, CONFIG, 8).look is (exported != 8)
    assert find_missed(tmp_path, CONFIG, 2).look, "by --mode=export, on the way"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    train_test.run(workdir, steps=4, image_every=2)
    return workdir


@pytest.mark.parametrize("last", [2, 4])
def test_run_that_ends_between_a_save_and_a_look_makes_up_for_it(
    last, whole, tmp_path, monkeypatch
):
    look = looks.Look.__call__

    def ending(self, state, frozen, step, *, writer):
        if step == last:
            raise KeyboardInterrupt
        look(self, state, frozen, step, writer=writer)

    with monkeypatch.context() as patch:
        patch.setattr(looks.Look, "__call__", ending)
        with pytest.raises(KeyboardInterrupt):
            train_test.run(tmp_path, steps=4, image_every=2)
    train_test.run(tmp_path, steps=4, image_every=2)
    train_test.assert_same_run(whole, tmp_path, step=4)
    one, other = (
        {path.name: path.read_bytes() for path in (workdir / "images").iterdir()}
        for workdir in (whole, tmp_path)
    )
    assert one == other and len(one) == 2


def test_finished_run_is_left_alone(whole):
    before = train_test.files(whole / "images")
    train_test.run(whole, steps=4, image_every=2)
    assert train_test.files(whole / "images") == before
