"""The command line, as a user meets it: real processes, small models, and mistakes."""

import json
import logging
import os
import pathlib
import re
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image

import dar_jax
from configs import mnist
from dar_jax import main
from dar_jax.config import build as read_config
from dar_jax.modes import evaluate, sample, train

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
    "--config.optimizer.name=adamw",
    "--config.train.steps=2",
    "--config.train.log_every=1",
    "--config.train.checkpoint_every=2",
    "--config.train.image_every=2",
    "--config.data.batch_size=4",
]
MAX_LINES_BEFORE_THE_FIRST_STEP = 10


def run(*arguments):
    """Run the command line; return (exit status, standard output, standard error)."""
    command = [sys.executable, "-m", "dar_jax.main", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
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
    assert output[: output.index(" step 1/2")].count("\n") <= MAX_LINES_BEFORE_THE_FIRST_STEP
    assert "token_embed" in (root / "dar/parameters.txt").read_text()
    assert json.loads((root / "dar/config.json").read_text())["task"] == "dar_prior"
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
    assert samples["indices"].shape == (6, 32)
    grid = Image.open(root / "dar/samples/grid.png")
    strip = Image.open(root / "dar/samples/previews.png")
    assert grid.height == strip.height  # two rows each
    assert strip.width > grid.width  # four previews against three images


IN_THE_FLAGS = {
    "unknown key": (["--config.data.batchsize=4"], "batch_size"),
    "key of another variant": (["--config.vae=a"], "unknown key 'vae'; "),
    "unknown mode": (["--mode=dance"], "dance"),
    "dash of an editor": (["\N{EN DASH}config.train.steps=3"], "mean --config.train.steps=3?"),
    "stray word": (["sample"], "did you mean --mode=sample?"),
    "unknown variant": (["--config=configs/mnist.py:cifar"], "'cifar'"),
    "label": (
        ["--mode=sample", "--config.sample.model={r}/dar/model", "--config.sample.labels=(3, 12)"],
        "12",
    ),
}


@pytest.mark.parametrize("name", IN_THE_FLAGS)
def test_mistake_on_the_command_line_is_one_line_with_status_2(trained, tmp_path, name):
    arguments, expected = IN_THE_FLAGS[name]
    arguments = [argument.format(r=trained[0]) for argument in arguments]
    status, _, error = run("--config=configs/mnist.py:dar", f"--workdir={tmp_path}", *arguments)
    assert status == 2, error
    (line,) = error.strip().splitlines()
    assert line.startswith("dar_jax: error: ")
    assert expected in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["--config.a.b=1", "--config.c=2", "--config.a.b=3"], ["--config.c=2", "--config.a.b=3"]),
        (["-config.a=1", "--config.a=2"], ["--config.a=2"]),
        (["--mode=train", "word", "word"], ["--mode=train", "word", "word"]),
        (["--workdir=~/x", "--config.a=~/y"], ["--workdir={h}/x", "--config.a={h}/y"]),
    ],
)
def test_last_value_of_a_key_counts_and_home_is_found(arguments, kept):
    home = os.path.expanduser("~")
    assert main._last_of_each(["main", *arguments]) == ["main", *(k.format(h=home) for k in kept)]


def test_config_may_come_after_its_keys():
    argv = ["main", "--config.a=1", "--mode", "train", "--config=mnist.py:dar", "--config.b=2"]
    config, rest = ["--config=mnist.py:dar"], ["--config.a=1", "--mode", "train", "--config.b=2"]
    assert main._config_first(argv) == ["main", *config, *rest]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("configs/mnst.py:dar", "no file configs/mnst.py in .*; did you mean configs/mnist.py"),
        ("mnits:dar", "no file mnits in .*; did you mean mnist.py"),
        ("configs", "no file configs in .*; name one, such as mnist.py"),
        ("/dev/zero", "no file /dev/zero"),
    ],
)
def test_config_file_that_is_none_is_refused(value, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=message):
        main._config_path(["main", f"--config={value}"])


BROKEN = {
    "def get_config():\n    return name": "broken.py, line 2: NameError: name 'name' is not",
    "def get_config(): return int('a')": "broken.py: invalid literal for int.*'a'",
    "def get_config() return 3": "broken.py, line 1: SyntaxError: expected ':'",
    "import no_such_module": "broken.py, line 1: ModuleNotFoundError: No module named 'no_such",
    "name = 3": "broken.py has no function get_config",
    "def get_config(): return 3": "get_config of .*broken.py returns 3, no ConfigDict",
}


@pytest.mark.parametrize("text", BROKEN)
def test_broken_config_file_is_one_line(text, tmp_path, monkeypatch, capsys):
    path = tmp_path / "broken.py"
    path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["main", f"--config={path}", "--workdir=none"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    with pytest.raises(SystemExit) as left:
        main.parse_flags(sys.argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and re.search(BROKEN[text], line), line


def test_memory_and_devices_that_are_not_there_are_one_line(monkeypatch, capsys):
    def fail(error):
        def mode(*_):
            raise error

        monkeypatch.setattr(main, "_CONFIG", mock.Mock(value=mnist.get_config("dar")))
        monkeypatch.setattr(main, "_MODE", mock.Mock(value="train"))
        monkeypatch.setattr(main, "_WORKDIR", mock.Mock(value="none"))
        monkeypatch.setattr(main, "_join_job", lambda _: None)
        monkeypatch.setattr(main, "pkgutil", mock.Mock(resolve_name=lambda _: mode))
        with pytest.raises(SystemExit, match="2"):
            main.main([])
        (line,) = capsys.readouterr().err.splitlines()
        return line

    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 9 bytes\nmore")
    assert "try --config.train.accumulation=4, --config.compute.remat=blocks" in fail(error)
    assert "make room and run it again" in fail(OSError(28, "No space left on device"))
    failing = mock.Mock(side_effect=RuntimeError("Unable to initialize backend 'cuda': no\nmore"))
    monkeypatch.setattr(jax, "devices", failing)
    assert "backend 'cuda': no; install 'dar-jax[gpu]'" in fail(error)


IN_THE_CONFIG = {
    "no model": ("dar", sample.sample, {"sample.untrained_model": ""}, "{w}"),
    "no tokenizer": ("dar", train.train_and_evaluate, {"tokenizer": "{w}/none"}, "{w}/none"),
    "data": ("tokenizer", train.train_and_evaluate, {"data.source": "imagenot"}, "'imagenot'"),
    "image size": ("tokenizer", train.train_and_evaluate, {"data.image_size": 28}, "28"),
    "task": ("tokenizer", train.train_and_evaluate, {"task": "dance"}, "'dance'"),
    "model": ("tokenizer", train.train_and_evaluate, {"model.encoder.dim": 65}, "65"),
    "dtype": ("tokenizer", train.train_and_evaluate, {"compute.dtype": "int8"}, "'int8'"),
    "guidance": ("dar", sample.sample, {"sample.guidance_scale": (1.0, 2.0, 3.0)}, "3.0"),
    "number": ("dar", evaluate.evaluate, {"evaluate.num_images": 0}, "num_images=0"),
}


@pytest.mark.parametrize("name", IN_THE_CONFIG)
def test_mistake_in_the_config_is_one_line_and_writes_nothing(tmp_path, name):
    variant, mode, changes, expected = IN_THE_CONFIG[name]
    config = mnist.get_config(variant)
    config.update_from_flattened_dict(
        {key: v.format(w=tmp_path) if isinstance(v, str) else v for key, v in changes.items()}
    )
    workdir = tmp_path / "workdir"
    with pytest.raises(ValueError, match=re.escape(expected.format(w=tmp_path))) as caught:
        mode(read_config(config), str(workdir))
    assert len(str(caught.value).splitlines()) == 1
    assert not workdir.exists()


def test_checkpoint_of_another_config_is_refused(trained):
    config = mnist.get_config("tokenizer")
    with pytest.raises(ValueError, match="config"):
        train.train_and_evaluate(read_config(config), str(trained[0] / "tokenizer"))


def test_help_names_modes_keys_configs_and_flags():
    """As printed by `python -m dar_jax`, whose module is not the one that defines the flags."""
    command = [sys.executable, "-m", "dar_jax", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    words = ("train", "sample", "evaluate", "convert", " sample.guidance_scale ", "--workdir:")
    assert all(word in shown for word in words)
    for path in (ROOT / "configs").glob("*.py"):
        assert path.stem.partition("_")[0] in shown or path.stem == "common"


def test_help_ends_quietly_where_nobody_reads_on():
    command = f"'{sys.executable}' -m dar_jax -h | true"
    done = subprocess.run(
        command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert not done.stderr


@pytest.mark.parametrize(
    "arguments", [[], ["--config=mnist.py"], ["--workdir=runs/first", "--mode=sample"]]
)
def test_what_is_lacking_is_one_line_with_an_example(arguments, monkeypatch, capsys):
    # Values stay from test to test, where all of them share one process.
    flags = {name: mock.Mock(value=None) for name in ("_CONFIG", "_WORKDIR")}
    for name, flag in flags.items():
        monkeypatch.setattr(main, name, flag)
    monkeypatch.setattr(sys, "argv", ["main", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main.parse_flags(sys.argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert "--config=FILE.py and --workdir=DIR are needed, as in dar-jax --config=mnist" in line


@pytest.mark.parametrize("form", ["--config={}", "--config {}", "-config={}"])
def test_config_of_the_package_is_found_in_every_form_of_the_flag(form):
    words = form.format("none.py:a").split()
    assert main._with_files(["dar-jax", *words]) == ["dar-jax", *words]
    *_, last = main._with_files(["dar-jax", *form.format("imagenet_dar.py:l").split()])
    assert last.endswith("configs/imagenet_dar.py:l")


@pytest.mark.parametrize(
    ("path", "level", "shown"),
    [
        ("dar_jax/modes/train.py", "INFO", True),
        (".venv/lib/python3.11/site-packages/orbax/checkpoint.py", "INFO", False),
        (".venv/lib/python3.11/site-packages/orbax/checkpoint.py", "WARNING", True),
    ],
)
def test_log_leaves_out_the_progress_of_libraries(path, level, shown):
    """Those of an environment in a checkout that is called dar_jax too."""
    attributes = {"pathname": str(ROOT / path), "levelno": getattr(logging, level)}
    assert main._is_ours_or_serious(logging.makeLogRecord(attributes)) is shown


def test_package_has_a_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", dar_jax.__version__)
