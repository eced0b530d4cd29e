"""What reaches Weights & Biases, with the real client and no network."""

import importlib.metadata
import json

import numpy as np
import pytest
import wandb
from PIL import Image

from dar_jax.config import build as read_config
from dar_jax.modes import train
from dar_jax.training import metrics, tracking
from dar_jax.training.tracking import WandbConfig
from tests.modes import train_test
from tests.training.toy_task import ToyTask


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A workdir whose runs stay on this machine, and tell nobody about it."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    (tmp_path / "config.json").write_text(json.dumps({"task": "toy", "seed": 1234567}))
    return tmp_path


def write(workdir, steps):
    writer = metrics.Writer(workdir, steps[0] - 1, 10, wandb=WandbConfig("digits"))
    pixels = np.full((4, 6, 3), steps[-1], np.uint8)
    for step in steps:
        writer.scalars(step, {"train/loss": 0.0625 + step})
    writer.pictures(steps[-1], {"samples": pixels})
    writer.close()
    wandb.teardown()  # waits for the file


def test_figures_and_pictures_are_kept_offline_and_a_resumed_run_has_the_same_id(workdir):
    write(workdir, [1, 2])
    write(workdir, [3, 4])
    runs = sorted(workdir.glob("wandb/offline-run-*"))
    run_id = (workdir / tracking.ID_NAME).read_text()
    assert len(runs) == 2
    for run, steps in zip(runs, ([1, 2], [3, 4]), strict=True):
        assert run.name.endswith(f"-{run_id}")
        (record,) = (path.read_bytes() for path in run.glob("*.wandb"))
        for text in ("digits", "train/loss", "1234567", *(f"{0.0625 + step}" for step in steps)):
            assert text.encode() in record
        (picture,) = run.rglob("samples*.png")
        np.testing.assert_array_equal(Image.open(picture), np.full((4, 6, 3), steps[-1], np.uint8))


@pytest.mark.slow
def test_training_that_resumes_is_tracked(workdir):
    for steps in (2, 4):
        config = train_test.make_config(steps, image_every=2)
        config.wandb = {"project": "digits"}
        train.train(read_config(config), str(workdir / "toy"), ToyTask())
        wandb.teardown()
    for run, step in zip(sorted(workdir.glob("toy/wandb/offline-run-*")), (2, 4), strict=True):
        (record,) = (path.read_bytes() for path in run.glob("*.wandb"))
        assert b"train/loss" in record and b"perf/images_per_second" in record
        # The look at step 2, which leaves no figures, is taken once more.
        (picture,) = run.rglob(f"*_{step}_*.png")
        name = picture.name.split(f"_{step}_")[0]
        written = Image.open(workdir / f"toy/images/{name}_{step:07d}.png")
        np.testing.assert_array_equal(Image.open(picture), written)


def test_missing_client_is_one_line_before_anything_is_written(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    WandbConfig("digits")
    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    WandbConfig()
    with pytest.raises(
        ValueError, match=r"'digits' needs wandb, .* pip install 'dar-jax\[wandb\]'"
    ):
        WandbConfig("digits")


def test_client_that_refuses_is_one_line(workdir, monkeypatch):
    def refuse(**_):
        raise wandb.errors.UsageError("No API key\nconfigured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match=r"project 'digits': .*\(No API key") as caught:
        write(workdir, [1])
    assert "\n" not in str(caught.value)
