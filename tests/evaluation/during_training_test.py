"""Evaluation while training: the metrics of `--mode=evaluate`, at every interval, kill or not."""

import functools
import json
import pathlib
import subprocess
import sys
import types

import pytest

from configs import mnist
from dar_jax.common import model_dir, storage
from dar_jax.config import build as read_config
from dar_jax.evaluation import during_training
from dar_jax.evaluation.during_training import _one_by_one
from dar_jax.evaluation.evaluators.base import Evaluation
from dar_jax.generation.resumable_arrays import MANIFEST_NAME
from dar_jax.modes import train

ROOT = pathlib.Path(__file__).parents[2]
EXACT = 1e-4  # the mesh differs
KILLED = 9
RUN = f"""
import os, sys
from dar_jax.config import build
from dar_jax.evaluation.evaluators import reconstruction
from dar_jax.modes import evaluate, train
from tests.evaluation.during_training_test import make_config
workdir, *modes = sys.argv[1:]
fill, calls = reconstruction.fill, []
def die_the_second_time(*arguments, **options):
    calls.append(arguments)
    if len(calls) == 2:
        os._exit({KILLED})
    fill(*arguments, **options)
if modes == ["die"]:
    reconstruction.fill = die_the_second_time
run = evaluate.evaluate if modes == ["evaluate"] else train.train_and_evaluate
run(build(make_config()), workdir)
"""


def make_config():
    config = mnist.get_config("tokenizer")
    for part in (config.model.encoder, config.model.condition, config.model.decoder):
        part.update(dim=32)
    config.model.encoder.depth = config.model.decoder.depth = 1
    config.data.update(source="synthetic", batch_size=8)
    config.train.update(steps=4, log_every=4, checkpoint_every=4, image_every=0, evaluate_every=2)
    config.evaluate.update(num_images=16, classifier=False)
    return config


def curve(workdir):
    """Step -> PSNR as it was logged."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    name = "eval/reconstruction/psnr_db"
    return {line["step"]: line[name] for line in lines if name in line}


def run(workdir, *modes):
    """Train, or "evaluate", or train and "die" in the second evaluation; return the exit status.

    In a process of its own, whose types are not checked: metrics are fetched as NumPy arrays.
    """
    command = [sys.executable, "-c", RUN, str(workdir), *modes]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


@pytest.mark.slow
def test_evaluation_in_training_is_the_mode_and_survives_a_kill(tmp_path):
    assert run(tmp_path / "whole") == 0
    whole = curve(tmp_path / "whole")
    assert list(whole) == [2, 4] and whole[2] != whole[4]
    assert list((tmp_path / "whole/evaluation").iterdir()) == []
    assert run(tmp_path / "whole", "evaluate") == 0
    results = json.loads((tmp_path / "whole/evaluation.json").read_text())
    assert results["reconstruction/psnr_db"] == pytest.approx(whole[4], rel=EXACT)

    assert run(tmp_path / "killed", "die") == KILLED
    assert list(curve(tmp_path / "killed")) == [2]
    assert run(tmp_path / "killed") == 0
    assert curve(tmp_path / "killed") == pytest.approx(whole, rel=EXACT)
    assert (tmp_path / "killed/model").exists()


def test_failed_evaluation_leaves_nothing_once_the_next_is_made(tmp_path, monkeypatch):
    judge = Evaluation.__new__(Evaluation)
    judge.directory = tmp_path
    judge.load = lambda path: types.SimpleNamespace(fingerprint=model_dir.fingerprint(path))
    evaluation = during_training.TrainEvaluation.__new__(during_training.TrainEvaluation)
    evaluation._evaluation, evaluation._path = judge, tmp_path / "model"

    def evaluate_model(judge, subject):
        step = int((tmp_path / "model" / model_dir.CONFIG_NAME).read_text())
        (tmp_path / f"images-{step}").mkdir()
        (tmp_path / f"images-{step}" / MANIFEST_NAME).write_text(subject.fingerprint)
        if step == 1:
            raise RuntimeError
        return {}

    def write(step, path):
        path.mkdir(exist_ok=True)
        (path / model_dir.CONFIG_NAME).write_text(str(step))
        (path / model_dir.WEIGHTS_NAME).touch()

    monkeypatch.setattr(during_training, "evaluate_model", evaluate_model)
    with pytest.raises(RuntimeError):
        evaluation(functools.partial(write, 1))
    assert {path.name for path in tmp_path.iterdir()} == {"model", "images-1"}
    evaluation(functools.partial(write, 2))
    assert not list(tmp_path.iterdir())


def test_model_to_evaluate_lies_in_the_bucket_of_the_workdir(in_bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluation = during_training.TrainEvaluation(read_config(make_config()), str(in_bucket))
    judge, written = evaluation._evaluation, []
    judge.load = lambda path: types.SimpleNamespace(fingerprint=path)
    monkeypatch.setattr(during_training, "evaluate_model", lambda judge, subject: {})

    def write(path):
        written.append(path)
        (path / model_dir.CONFIG_NAME).write_text("{}")

    assert evaluation(write) == {}
    assert written == [in_bucket / "evaluation" / "model"]
    assert storage.files_below(in_bucket) == [] and not [*tmp_path.iterdir()]


def test_lists_are_logged_one_by_one():
    metrics = {"a/b": 1.5, "a/each": [2.0, 3.0], "guidance/scales": [(1.0,), (1.1, 3.0)]}
    assert _one_by_one(metrics) == [("a/b", 1.5), ("a/each_1", 2.0), ("a/each_2", 3.0)]


def test_bad_evaluation_is_refused_before_training_starts(tmp_path):
    config = make_config()
    config.evaluate.features = "resnet"
    with pytest.raises(ValueError, match="features='resnet' must be one of"):
        train.train_and_evaluate(read_config(config), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
