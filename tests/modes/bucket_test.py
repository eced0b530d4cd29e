"""Runs in a bucket: they end as in a folder, whatever is killed on the way."""

import http.server
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from subprocess import PIPE
from unittest import mock

import jax
import numpy as np
import pytest

import dar_jax
from dar_jax.common import model_dir, storage
from dar_jax.generation.resumable_arrays import is_whole_archive
from dar_jax.modes import train
from dar_jax.training import checkpoint, staged_checkpoints
from tests import tiny_model
from tests.emulator import readable
from tests.modes.train_test import KILL_TIMEOUT_S, RUN_TOY, run

ROOT = pathlib.Path(__file__).parents[2]
TIMES = ("perf/",)
STEPS = 16
"""Of runs that are disturbed, with a checkpoint after every other."""


@pytest.fixture(autouse=True)
def no_folder_named_after_a_scheme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(":")]


def curve(workdir):
    lines = (storage.to_path(str(workdir)) / "metrics.jsonl").read_text().splitlines()
    values = [json.loads(line) for line in lines]
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in values]


def state(workdir, step):
    kept = storage.to_path(str(workdir)) / "checkpoints" / str(step)
    with readable(kept) as path, checkpoint.ocp.StandardCheckpointer() as reader:
        restored = reader.restore(path / "state")
    restored["rng"] = np.asarray(jax.random.key_data(restored["rng"]))
    return jax.device_get(restored), json.loads((kept / "data" / "metadata").read_text())


def assert_same_run(first, second, step):
    assert curve(first) == curve(second)
    (one, data), (other, other_data) = state(first, step), state(second, step)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert data == other_data
    paths = [storage.to_path(str(w)) / "model" / "model.safetensors" for w in (first, second)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of four steps in a folder."""
    workdir = tmp_path_factory.mktemp("whole")
    run(workdir, steps=4, image_every=2)
    return workdir


def test_run_that_resumes_in_a_bucket_equals_one_in_a_folder_bitwise(whole, in_bucket):
    run(in_bucket, steps=2, image_every=2)
    half = (in_bucket / "checkpoints" / "4").is_dir()
    run(in_bucket, steps=4, image_every=2)
    assert not half
    assert_same_run(whole, in_bucket, step=4)
    found = {path.relative_to(in_bucket).as_posix() for path in storage.files_below(in_bucket)}
    promised = {p.relative_to(whole).as_posix() for p in whole.rglob("*") if p.is_file()}
    missing = {name for name in promised - found if not name.startswith(("checkpoints/", "events"))}
    assert not missing and sum(name.startswith("events") for name in found) == 2
    assert not any(path.name.startswith(".") for path in in_bucket.iterdir())
    assert marker(in_bucket / "checkpoints" / "4").exists()
    export(in_bucket)


def marker(directory):
    """What says that all of a checkpoint is there."""
    staged = staged_checkpoints.is_staged(directory)
    return directory / ("digests.json" if staged else "commit_success.txt")


def export(workdir):
    """The model directory of a workdir is found, complete and checked."""
    config, _ = model_dir.load_model(model_dir.locate(str(workdir)))
    assert (config["kind"], config["step"]) == ("toy", 4)


@pytest.mark.slow
def test_checkpoint_that_is_half_written_is_passed_over_and_written_again(whole, in_bucket):
    run(in_bucket, steps=4, image_every=2)
    marker(in_bucket / "checkpoints" / "4").unlink()
    storage.delete_tree(in_bucket / "checkpoints" / "4" / "state")
    assert checkpoint.latest_step(in_bucket / "checkpoints") == 2
    run(in_bucket, steps=4, image_every=2)
    assert_same_run(whole, in_bucket, step=4)


@pytest.mark.slow
def test_damaged_checkpoint_is_set_aside(whole, in_bucket):
    run(in_bucket, steps=4, image_every=2)
    (in_bucket / "checkpoints" / "4" / "state" / "manifest.ocdbt").write_bytes(b"damaged")
    run(in_bucket, steps=4, image_every=2)
    assert_same_run(whole, in_bucket, step=4)
    names = sorted(path.name for path in (in_bucket / "checkpoints").iterdir())
    assert names == ["2", "4", "4-0.damaged"]


def test_bucket_that_does_not_exist_is_one_line_before_anything_is_compiled(emulator):
    address = f"{emulator.scheme}://nowhere/run"
    with pytest.raises(ValueError, match=f"cannot use {address}: there is no such bucket"):
        run(address, steps=2)


def test_path_of_an_object_is_no_workdir(in_bucket):
    storage.append(in_bucket, b"precious")
    with pytest.raises(ValueError, match="it is an object, no folder; choose another"):
        run(in_bucket, steps=2)
    assert in_bucket.read_bytes() == b"precious"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model.save(tmp_path_factory.mktemp("models"))


def test_model_in_a_bucket_draws_what_it_does_in_a_folder(model, in_bucket):
    storage.upload_tree(model, in_bucket / "model", last="digests.json")
    here, there = dar_jax.from_pretrained(model), dar_jax.from_pretrained(f"{in_bucket}")
    one, other = (pipeline.generate([3, 1], rng=0) for pipeline in (here, there))
    np.testing.assert_array_equal(one.images, other.images)
    one.save(f"{in_bucket}/grid.png")
    assert (in_bucket / "grid.png").exists()


def test_model_that_is_half_written_is_refused(model, in_bucket):
    storage.upload_tree(model, in_bucket / "model", last="digests.json")
    (in_bucket / "model" / "digests.json").unlink()
    with pytest.raises(ValueError, match="no model directory, or one that is not complete"):
        dar_jax.from_pretrained(f"{in_bucket}/model")


COMMAND = (
    *(sys.executable, "-m", "dar_jax.main", "--config=configs/mnist.py:dar"),
    "--config.data.source=synthetic",
    f"--config.data.image_size={tiny_model.SIZE}",
    "--config.sample.batch_size=4",
)
SET = ("--mode=sample", "--config.sample.num_images=48")


def start(model, workdir, *arguments, **options):
    command = [*COMMAND, f"--workdir={workdir}", f"--config.sample.model={model}", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=dict(os.environ), **options)


class Refusing(http.server.BaseHTTPRequestHandler):
    """A bucket of either service that may be read, has no objects, and may not be written."""

    def do_HEAD(self):
        self.answer(404, b"")

    def do_GET(self):
        if "list-type=2" in self.path:
            self.answer(200, b"<ListBucketResult></ListBucketResult>")
            return
        self.answer(404 if "/o/" in self.path else 200, b'{"kind": "storage#objects"}')

    def do_POST(self):
        self.answer(
            403, b'{"error": {"code": 403, "message": "Forbidden: storage.objects.create"}}'
        )

    def do_PUT(self):
        self.answer(403, b"<Error><Code>AccessDenied</Code><Message>Forbidden</Message></Error>")

    def answer(self, status, body):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(status)
        is_json = body.startswith(b"{")
        self.send_header("Content-Type", "application/json" if is_json else "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def refusing(emulator, monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("STORAGE_EMULATOR_HOST", "AWS_ENDPOINT_URL"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_port}")
        yield
        server.shutdown()


@pytest.mark.usefixtures("refusing")
def test_bucket_that_may_not_be_written_is_one_line_before_any_work(model, emulator):
    address = f"{emulator.scheme}://bbb/run"
    process = start(model, address, "--mode=sample", stdout=PIPE, stderr=PIPE, text=True)
    output, error = process.communicate()
    assert process.returncode == 2 and "Model" not in output
    assert re.fullmatch(f"dar_jax: error: cannot use {address}: Forbidden.*rights.*\n", error)


def pieces(workdir):
    directory = storage.to_path(str(workdir)) / "samples" / "set"
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted(path.name for path in found if path.suffix == ".npz")


def merged(workdir):
    path = storage.to_path(str(workdir)) / "samples" / "samples_48x16x16x3.npz"
    assert is_whole_archive(path)
    with storage.open_binary(path) as file, np.load(file) as arrays:
        return arrays["arr_0"], arrays["arr_1"]


@pytest.mark.slow
def test_set_of_four_processes_two_of_them_killed_equals_that_of_one(model, anywhere, tmp_path):
    """One of those that are left came late."""
    workdir = anywhere / "set"
    assert start(model, tmp_path / "one", *SET).wait() == 0
    processes = [start(model, workdir, *SET) for _ in range(3)]
    for count in (2, 4):
        while len(pieces(workdir)) < count:
            assert processes[2].poll() is None
            time.sleep(0.02)
        processes.pop(0).kill()
        if count == 2:
            processes.append(start(model, workdir, *SET))
    assert [process.wait() for process in processes] == [0, 0]
    assert pieces(workdir) == pieces(tmp_path / "one")
    for one, other in zip(merged(tmp_path / "one"), merged(workdir), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not [path for path in storage.files_below(workdir) if path.name.startswith(".")]


@pytest.mark.slow
def test_evaluation_in_a_bucket_measures_what_it_does_in_a_folder(model, in_bucket, tmp_path):
    storage.upload_tree(model, in_bucket / "model", last="digests.json")
    arguments = (
        "--mode=evaluate",
        *("--config.evaluate.evaluators=reconstruction,likelihood", "--config.evaluate.features="),
        *("--config.evaluate.num_images=24", "--config.evaluate.classifier=False"),
    )
    for where, path in ((tmp_path / "one", model), (in_bucket, f"{in_bucket}/model")):
        assert start(path, where, *arguments).wait() == 0
    one, other = (
        json.loads((storage.to_path(str(where)) / "evaluation.json").read_text())
        for where in (tmp_path / "one", in_bucket)
    )
    assert one == other


def start_toy(workdir, steps):
    command = [sys.executable, "-c", RUN_TOY, str(workdir), str(steps)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_killed_run_resumes_bitwise(in_bucket, tmp_path):
    process = start_toy(tmp_path / "one", STEPS)
    assert process.wait(KILL_TIMEOUT_S) == 0
    process = start_toy(in_bucket, STEPS)
    while (checkpoint.latest_step(in_bucket / "checkpoints") or 0) < 6:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert start_toy(in_bucket, STEPS).wait(KILL_TIMEOUT_S) == 0
    assert_same_run(tmp_path / "one", in_bucket, step=STEPS)


@pytest.mark.slow
def test_bucket_that_is_gone_for_a_while_costs_nothing(emulator, in_bucket, tmp_path):
    process = start_toy(in_bucket, STEPS)
    for step in (4, 8):
        while (checkpoint.latest_step(in_bucket / "checkpoints") or 0) < step:
            assert process.poll() is None
            time.sleep(0.1)
        emulator.kill()
        time.sleep(3)
        assert process.poll() is None
        emulator.start()
    assert process.wait(KILL_TIMEOUT_S) == 0
    assert start_toy(tmp_path / "one", STEPS).wait(KILL_TIMEOUT_S) == 0
    assert_same_run(tmp_path / "one", in_bucket, step=STEPS)


def test_two_runs_in_one_workdir_refuse_each_other(in_bucket):
    with (
        mock.patch("dar_jax.parallel.leases.RENEW_SECONDS", 0.1),
        train.exclusive(in_bucket),
        pytest.raises(ValueError, match=rf"another run is at work in {in_bucket} \(process \d+ on"),
    ):
        run(in_bucket, steps=2)
    assert storage.entries(in_bucket) == []
