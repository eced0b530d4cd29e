"""The training loop on a toy task: resuming, killing, refusing."""

import base64
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import ml_collections
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dar_jax.common import model_dir
from dar_jax.config import build as read_config
from dar_jax.modes import train
from dar_jax.training import checkpoint, page
from tests.data import small_files
from tests.training.toy_task import ToyTask

RUN_TOY = """
import sys
from tests.modes import train_test
train_test.run(sys.argv[1], steps=int(sys.argv[2]))
"""
KILL_TIMEOUT_S = 300
SMALL = 2**16
"""Bytes; more than any file of a run has but for its checkpoints."""


def make_config(steps, **train_block):
    return ml_collections.ConfigDict(
        {
            "task": "toy",
            "seed": 0,
            "data": {"source": "synthetic", "image_size": 8, "batch_size": 16},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2, "ema_decay": 0.9},
            "train": {
                "steps": steps,
                "log_every": 1,
                "checkpoint_every": 2,
                "image_every": 0,
                **train_block,
            },
            "mesh": {"data": 4, "fsdp": 2},
        }
    )


def run(workdir, steps, task=None, **train_block):
    config = make_config(steps, **train_block)
    config.mesh = {"data": -1} if jax.device_count() == 1 else config.mesh
    train.train(read_config(config), str(workdir), task or ToyTask())


def read_curve(workdir):
    """The lines of metrics.jsonl without their timings."""
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith("perf/")}
        for line in lines
    ]


def files(workdir):
    paths = pathlib.Path(workdir).rglob("*")
    return {path: path.stat().st_mtime_ns for path in paths}


def restored(workdir, step):
    path = pathlib.Path(workdir) / "checkpoints" / str(step)
    with checkpoint.ocp.StandardCheckpointer() as reader:
        state = reader.restore(path / "state")
    state["rng"] = np.asarray(jax.random.key_data(state["rng"]))
    position = json.loads((path / "data" / "metadata").read_text())
    return jax.device_get(state), position


def assert_same_run(first, second, step):
    assert read_curve(first) == read_curve(second)
    (state, data), (other_state, other_data) = restored(first, step), restored(second, step)
    jax.tree.map(np.testing.assert_array_equal, state, other_state)
    assert data == other_data
    weights = [(w / "model" / "model.safetensors").read_bytes() for w in (first, second)]
    assert weights[0] == weights[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of an uninterrupted run of four steps; not to be changed."""
    workdir = tmp_path_factory.mktemp("whole")
    run(workdir, steps=4, image_every=2)
    return workdir


def test_report_is_one_file_with_pictures_curves_and_what_to_do_next(whole):
    text = (whole / "report.html").read_text()
    (picture,) = page.latest_pictures(whole / "images")
    assert picture.stem.endswith("0000004")
    assert base64.b64encode(picture.read_bytes()).decode() in text
    assert "<polyline" in text and "train/loss" in text
    assert "--config.train.steps=8" in text and f"{whole}/model" in text
    assert "http" not in text, "it needs nothing else"


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The workdir of a run of two steps; not to be changed."""
    workdir = tmp_path_factory.mktemp("half")
    run(workdir, steps=2)
    return workdir


@pytest.fixture
def workdir(half, tmp_path):
    """A copy of `half`."""
    return pathlib.Path(shutil.copytree(half, tmp_path / "copy"))


def test_resumed_run_equals_an_uninterrupted_one_bitwise(whole, workdir):
    run(workdir, steps=4)
    assert_same_run(whole, workdir, step=4)
    assert [line["step"] for line in read_curve(workdir)] == [1, 2, 3, 4]


def test_a_run_leaves_everything_that_is_promised(whole):
    curve = read_curve(whole)
    assert curve[0].keys() == {
        "step",
        "train/loss",
        "train/mse",
        "train/grad_norm",
        "train/learning_rate",
    }
    assert [line["train/learning_rate"] for line in curve[:3]] == pytest.approx([0, 5e-4, 1e-3])
    assert curve[-1]["train/loss"] < curve[0]["train/loss"]
    config = make_config(4, image_every=2)
    written = ml_collections.ConfigDict(json.loads((whole / "config.json").read_text()))
    assert read_config(written) == read_config(config)
    for step in (2, 4):
        picture = Image.open(whole / "images" / f"reconstruction_{step:07d}.png")
        assert picture.height == 30 + 16 * 65  # a header, and a row per held-out picture
    events = EventAccumulator(str(whole)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Images("reconstruction")] == [2, 4]
    config, params = model_dir.load_model(whole / "model")
    assert (config["kind"], config["model"]["width"], config["step"]) == ("toy", 128, 4)
    assert config["class_names"][3] == "class 3"
    state, _ = restored(whole, 4)
    jax.tree.map(np.testing.assert_array_equal, params, state["ema_params"])


def test_metrics_are_averaged_over_the_logging_interval(whole, workdir):
    run(workdir, steps=4, log_every=2)
    each, pair = read_curve(whole)[2:], read_curve(workdir)[-1]
    mean = (each[0]["train/loss"] + each[1]["train/loss"]) / 2
    assert [line["step"] for line in read_curve(workdir)] == [1, 2, 4]
    assert pair["train/loss"] == pytest.approx(mean, rel=1e-6)


def test_running_a_finished_run_again_only_makes_up_for_a_lost_export(half, workdir, caplog):
    (workdir / "model" / "config.json").unlink()
    train.logging.get_absl_logger().propagate = True
    with caplog.at_level("INFO", logger="absl"):
        run(workdir, steps=2)
    assert any("is trained: step 2 of 2" in message for message in caplog.messages)
    assert_same_run(half, workdir, step=2)


def test_nan_loss_stops_and_names_step_and_last_good_checkpoint(workdir):
    with pytest.raises(ValueError, match="step 3: loss nan") as caught:
        run(workdir, steps=6, task=ToyTask(nan_from_label=0), max_skipped=0)
    assert f"the last good checkpoint is {workdir / 'checkpoints' / '2'}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2"]
    assert [line["step"] for line in read_curve(workdir)] == [1, 2]


def test_nan_before_the_first_checkpoint_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"step 1: loss nan.*there is not a checkpoint yet"):
        run(tmp_path, steps=2, task=ToyTask(nan_from_label=0), max_skipped=0)


def test_steps_that_are_not_finite_are_skipped_and_named(tmp_path, caplog):
    train.logging.get_absl_logger().propagate = True
    with caplog.at_level("WARNING", logger="absl"):
        run(tmp_path, steps=4, task=ToyTask(nan_from_label=0))
    skipped = [message for message in caplog.messages if "skipped, as" in message]
    assert skipped and all(": loss nan, gradient norm 0.0; it saw record " in s for s in skipped)
    assert skipped[0].endswith("and 8 more; skipped, as 1 of at most 100")
    lost = {int(text.split(":")[0].removeprefix("step ")) for text in skipped}
    assert {line["step"] for line in read_curve(tmp_path) if "train/loss" not in line} == lost
    state, _ = restored(tmp_path, 4)
    assert int(state["step"]) == 4
    model_dir.load_model(tmp_path / "model")  # finite


def test_parameters_that_are_not_finite_are_not_saved(workdir):
    config = make_config(steps=4)
    optimizer = {"learning_rate": 3e38, "weight_decay": 1e3, "warmup_steps": 2}
    config.optimizer = {**optimizer, "ema_decay": 0.9}
    with pytest.raises(ValueError, match=r"not finite.*there is not a checkpoint yet; lower") as c:
        train.train(read_config(config), str(workdir / "new"), ToyTask())
    assert "\n" not in str(c.value)


def test_failed_evaluation_does_not_end_training(tmp_path, monkeypatch, caplog):
    class Failing(train.TrainEvaluation):
        def __init__(self, config, workdir):
            pass

        def __call__(self, write_model):
            raise RuntimeError("no memory\nand more")

    monkeypatch.setattr(train, "TrainEvaluation", Failing)
    train.logging.get_absl_logger().propagate = True
    with caplog.at_level("ERROR", logger="absl"):
        run(tmp_path, steps=2, evaluate_every=1)
    expected = "The evaluation of step 1 failed, training goes on: RuntimeError: no memory"
    assert caplog.messages[0] == expected
    assert (tmp_path / "model").is_dir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer.learning_rate": 3e-3}, r"optimizer\.learning_rate=0\.001, .* has 0\.003"),
        ({"seed": 5}, "seed=0, the config has 5"),
    ],
)
def test_checkpoint_of_another_config_is_refused_and_nothing_is_written(workdir, change, message):
    before = files(workdir)
    config = make_config(steps=4)
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=message) as caught:
        train.train(read_config(config), str(workdir), ToyTask())
    assert "\n" not in str(caught.value)
    assert files(workdir) == before


@pytest.mark.parametrize(
    ("block", "key", "value", "message"),
    [
        ("data", "batch_size", 12, "batch_size 12 does not divide over 8"),
        ("data", "source", "nowhere", "unknown source 'nowhere'"),
        ("data", "batchsize", 16, "unknown key 'batchsize'; did you mean 'batch_size'"),
        ("mesh", "data", 3, "does not multiply to the 8 devices"),
        ("mesh", "dcn_data", 2, "dcn_data 2: the devices form 1 slices; set mesh.dcn_data=1"),
        ("train", "init_from", "nowhere", "nowhere is not a readable model directory"),
        ("train", "steps", 0, "steps 0 is not positive"),
        ("optimizer", "lerning_rate", 1.0, "did you mean 'learning_rate'"),
    ],
)
def test_bad_config_is_one_line_and_nothing_is_written(tmp_path, block, key, value, message):
    config = make_config(steps=2)
    config.unlock()
    config[block][key] = value
    with pytest.raises(ValueError, match=message) as caught:
        train.train(read_config(config), str(tmp_path / "new"), ToyTask())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        (("val/0.png",), "has pictures but no class folders"),
        (("val/notes.txt",), "val has no pictures"),
        (("val/bird/0.png",), "classes that the training part has not: 'bird'"),
        ((), "no class has two"),
    ],
)
def test_held_out_part_is_checked_before_anything_is_written(tmp_path, held_out, message):
    small_files.write(tmp_path / "set", "train/cat/0.png", *held_out)
    config = make_config(steps=2)
    config.data = {"source": "folder", "path": str(tmp_path / "set"), "batch_size": 16}
    with pytest.raises(ValueError, match=message) as caught:
        train.train(read_config(config), str(tmp_path / "new"), ToyTask())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_workdir_that_is_no_directory_is_one_line(tmp_path):
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="cannot use workdir") as caught:
            run(path, steps=2)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert (tmp_path / "file").read_text() == "precious"


def test_empty_workdir_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="workdir is empty"):
        run("", steps=2)
    assert not list(tmp_path.iterdir())


def test_workdir_without_permission_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="no permission"):
        run(tmp_path, steps=2)
    assert not list(tmp_path.iterdir())


def at_step(step, action, monkeypatch):
    """Call `action` while the batch of a run's `step`-th step, counted from its start, is put."""
    count = 0

    def put_batch(*arguments):
        nonlocal count
        count += 1
        if count == step:
            action()
        return original(*arguments)

    original = train.sharding.put_batch
    monkeypatch.setattr(train.sharding, "put_batch", put_batch)


OTHER_SIGNALS = [
    pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGHUP)
]


@pytest.mark.parametrize("number", [signal.SIGTERM, *OTHER_SIGNALS])
def test_signal_saves_at_once_and_the_same_command_continues_exactly(tmp_path, monkeypatch, number):
    handler = signal.SIG_DFL  # whatever started the tests, such as nohup
    before = signal.signal(number, handler)
    at_step(3, lambda: signal.raise_signal(number), monkeypatch)
    arguments = dict(steps=4, log_every=2, checkpoint_every=4)
    run(tmp_path / "stopped", **arguments)
    assert [path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["3"]
    assert not (tmp_path / "stopped" / "model").exists()
    assert signal.signal(number, before) is handler
    for workdir in ("stopped", "whole"):
        run(tmp_path / workdir, **arguments)
    assert [line["step"] for line in read_curve(tmp_path / "stopped")] == [2, 4]
    assert_same_run(tmp_path / "stopped", tmp_path / "whole", step=4)


def test_full_disk_stops_with_the_last_good_step_and_the_run_goes_on_later(
    whole, workdir, monkeypatch
):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(1, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, limits[1])), monkeypatch)
    try:
        with pytest.raises(ValueError, match=r"saving to .* failed: ") as caught:
            run(workdir, steps=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"the last good checkpoint is {workdir / 'checkpoints' / '2'};" in str(caught.value)
    assert "\n" not in str(caught.value)
    run(workdir, steps=4)
    assert_same_run(whole, workdir, step=4)


def start(workdir, steps):
    root = pathlib.Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", RUN_TOY, str(workdir), str(steps)]
    return subprocess.Popen(command, env=environment, cwd=root, stderr=subprocess.PIPE, text=True)


def wait_for_step(process, workdir, step):
    path = pathlib.Path(workdir) / "checkpoints" / str(step)
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_run_continues_with_the_same_command(tmp_path):
    steps = 60
    process = start(tmp_path / "killed", steps)
    wait_for_step(process, tmp_path / "killed", step=10)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(read_curve(tmp_path / "killed")) < steps
    for workdir in ("killed", "whole"):
        process = start(tmp_path / workdir, steps)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert_same_run(tmp_path / "killed", tmp_path / "whole", steps)
    assert [line["step"] for line in read_curve(tmp_path / "whole")] == list(range(1, steps + 1))
