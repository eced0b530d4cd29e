"""The command line, as a user meets it: real processes, small models, and mistakes."""

import json
import os
import pathlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
TINY_TOKENIZER = [
    "--config.model.encoder.dim=32",
    "--config.model.condition.dim=32",
    "--config.model.decoder.dim=32",
    "--config.model.decoder.depth=1",
    "--config.compute.unroll=False",
]
TINY_PRIOR = ["--config.model.dim=32", "--config.model.num_layers=1", "--config.model.ffn_dim=32"]
SHORT = [
    "--config.train.steps=2",
    "--config.train.log_every=1",
    "--config.train.checkpoint_every=2",
    "--config.train.image_every=2",
    "--config.data.batch_size=4",
]


def run(*arguments):
    """Run the command line; return (exit status, standard output, standard error)."""
    command = [sys.executable, "-m", "dar_jax.main", *map(str, arguments)]
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tokenizer and a prior, both trained for two steps."""
    root = tmp_path_factory.mktemp("runs")
    tokenizer = ["--config=configs/mnist.py:tokenizer", f"--workdir={root}/tokenizer"]
    status, output, error = run(*tokenizer, *TINY_TOKENIZER, *SHORT)
    assert status == 0, error
    prior = [
        "--config=configs/mnist.py:dar",
        f"--workdir={root}/dar",
        f"--config.tokenizer={root}/tokenizer/model",
    ]
    status, output, error = run(*prior, *TINY_PRIOR, *SHORT)
    assert status == 0, error
    return root, output


def test_training_reports_progress_and_writes_pictures(trained):
    root, output = trained
    assert "step 2/2" in output
    assert "token_embed" in output  # the parameter overview
    lines = [json.loads(line) for line in (root / "dar/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert np.isfinite([line["train/loss"] for line in lines]).all()
    for picture in (
        "tokenizer/images/reconstruction_0000002.png",
        "dar/images/samples_0000002.png",
    ):
        assert np.asarray(Image.open(root / picture)).std() > 0


def test_sample_mode_writes_grid_strip_and_indices(trained):
    root, _ = trained
    status, output, error = run(
        "--config=configs/mnist.py:dar",
        f"--workdir={root}/dar",
        "--mode=sample",
        "--config.sample.labels=(7, 1)",
        "--config.sample.images_per_class=3",
        "--config.sample.guidance_scale=(1.1, 4.0)",
    )
    assert status == 0, error
    assert "6 of 6 images" in output
    samples = np.load(root / "dar/samples/samples.npz")
    assert samples["labels"].tolist() == [7, 7, 7, 1, 1, 1]
    assert samples["indices"].shape == (6, 16)
    grid = Image.open(root / "dar/samples/grid.png")
    strip = Image.open(root / "dar/samples/previews.png")
    assert grid.height == strip.height  # two rows each
    assert strip.width > grid.width  # eight previews against three images


MISTAKES = {
    "unknown key": (
        ["--config=configs/mnist.py:dar", "--workdir={w}", "--config.data.batchsize=4"],
        "batch_size",
    ),
    "unknown variant": (["--config=configs/mnist.py:cifar", "--workdir={w}"], "'cifar'"),
    "unknown mode": (
        ["--config=configs/mnist.py:dar", "--workdir={w}", "--mode=dance"],
        "dance",
    ),
    "no workdir": (["--config=configs/mnist.py:dar"], "workdir"),
    "no model": (["--config=configs/mnist.py:dar", "--workdir={w}", "--mode=sample"], "{w}/model"),
    "no tokenizer": (
        ["--config=configs/mnist.py:dar", "--workdir={w}", "--config.tokenizer={w}/none"],
        "{w}/none",
    ),
    "unknown data": (
        ["--config=configs/mnist.py:tokenizer", "--workdir={w}", "--config.data.source=imagenot"],
        "'imagenot'",
    ),
    "image size": (
        ["--config=configs/mnist.py:tokenizer", "--workdir={w}", "--config.data.image_size=28"],
        "28",
    ),
    "label": (
        [
            "--config=configs/mnist.py:dar",
            "--workdir={w}",
            "--mode=sample",
            "--config.sample.model={r}/dar/model",
            "--config.sample.labels=(3, 12)",
        ],
        "12",
    ),
    "other config": (
        ["--config=configs/mnist.py:tokenizer", "--workdir={r}/tokenizer"],
        "model",
    ),
}


@pytest.fixture(scope="module")
def answers(trained, tmp_path_factory):
    """What every mistake is answered with; the processes run side by side."""
    root, _ = trained
    paths = {name: tmp_path_factory.mktemp("workdir") for name in MISTAKES}

    def answer(name):
        arguments, expected = MISTAKES[name]
        filled = [argument.format(w=paths[name], r=root) for argument in arguments]
        return (*run(*filled), expected.format(w=paths[name]), paths[name])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(MISTAKES, pool.map(answer, MISTAKES), strict=True))


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line_with_status_2_and_writes_nothing(answers, name):
    status, _, error, expected, workdir = answers[name]
    lines = error.strip().splitlines()
    assert status == 2, error
    assert expected in lines[-1]
    assert lines[-1].startswith("dar_jax: error: ")
    assert "Traceback" not in error
    assert list(workdir.iterdir()) == []


def test_help_names_modes_and_keys():
    _, output, _ = run("--help")
    for word in ("train", "sample", "evaluate", "config.sample.guidance_scale"):
        assert word in output
