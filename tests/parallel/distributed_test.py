"""Jobs of several processes on this machine: joining, agreeing, dying, being preempted."""

import fcntl
import itertools
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from dar_jax.config import build as read_config
from dar_jax.data import pipeline
from dar_jax.modes import train
from dar_jax.parallel import distributed, sharding
from dar_jax.parallel.sharding import MeshConfig
from dar_jax.training.checkpoint import Checkpoints
from dar_jax.training.state import abstract_state
from tests.modes import train_test
from tests.training.toy_task import ToyTask

ROOT = pathlib.Path(__file__).parents[2]
RUN_JOB = """
import sys, time
from dar_jax.parallel import distributed
process, address, workdir, pause = int(sys.argv[1]), *sys.argv[2:4], float(sys.argv[4])
distributed.initialize(address, 2, process, timeout_s=120.0)
from tests.parallel import distributed_test
distributed_test.train_toy(workdir, pause, break_at=int(sys.argv[5]))
"""
STEPS = 40
TIMEOUT_S = 900
"""A process that hangs in a collective with a dead one is aborted by JAX after 100 s."""


def job_config():
    config = train_test.make_config(STEPS, log_every=3, checkpoint_every=10)
    config.mesh = {"data": 2, "fsdp": 2}
    return config


def train_toy(workdir, pause, break_at):
    """What each process of a job runs: `pause` seconds before every step, one of which breaks."""
    put_batch, steps = train.sharding.put_batch, itertools.count(1)

    def slow_put_batch(*arguments):
        time.sleep(pause)
        if next(steps) == break_at:
            raise jax.errors.JaxRuntimeError("UNKNOWN: Connection closed by peer\nand more")
        return put_batch(*arguments)

    train.sharding.put_batch = slow_put_batch
    train.train(read_config(job_config()), workdir, ToyTask())


def free_address():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{sock.getsockname()[1]}"


def start(command, cwd=ROOT):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "2"}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment,
        cwd=cwd,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def start_job(workdir, pause=0.0, break_at=0):
    address = free_address()
    return [start(["-c", RUN_JOB, i, address, workdir, pause, break_at]) for i in range(2)]


def finish(processes):
    """Wait for all; return the exit statuses and what was written to standard error."""
    try:
        errors = [process.communicate(timeout=TIMEOUT_S)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], errors


def run_job(workdir):
    status, errors = finish(start_job(workdir))
    assert status == [0, 0], errors


def final_state(workdir):
    """Restore the last checkpoint of a job into this process's eight devices."""
    settings = read_config(job_config())
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8))
    iterator = pipeline.train_iterator(settings.data, settings.seed)
    bound = read_config(job_config()).bound()
    checkpoints = Checkpoints(workdir / train.CHECKPOINTS, bound, keep=3)
    state, report = checkpoints.restore(
        abstract_state(ToyTask(), settings.optimizer, mesh), iterator
    )
    checkpoints.close()
    return jax.device_get(state.replace(rng=None)), report["metrics"], iterator.get_state()


def assert_same_end(workdir, other):
    assert train_test.read_curve(workdir) == train_test.read_curve(other)
    jax.tree.map(np.testing.assert_array_equal, final_state(workdir), final_state(other))
    weights = [(path / "model" / "model.safetensors").read_bytes() for path in (workdir, other)]
    assert weights[0] == weights[1]


@pytest.mark.slow  # 3 minutes, half of which the survivor of a kill may take to notice
def test_killed_and_preempted_jobs_end_as_the_uninterrupted_one(tmp_path):
    run_job(tmp_path / "whole")

    job = start_job(tmp_path / "killed", pause=0.2)
    train_test.wait_for_step(job[0], tmp_path / "killed", step=10)
    os.kill(job[1].pid, signal.SIGKILL)
    status, _ = finish(job)
    # Whether the survivor's collective fails or hangs is a matter of timing.
    assert status[0] in (distributed.STATUS_LOST_PEER, -signal.SIGABRT)
    assert status[1] == -signal.SIGKILL
    run_job(tmp_path / "killed")
    assert_same_end(tmp_path / "whole", tmp_path / "killed")

    job = start_job(tmp_path / "preempted", pause=0.2)
    train_test.wait_for_step(job[0], tmp_path / "preempted", step=10)
    os.kill(job[1].pid, signal.SIGTERM)
    status, errors = finish(job)
    assert status == [0, 0], errors
    steps = [int(path.name) for path in (tmp_path / "preempted" / "checkpoints").iterdir()]
    assert 10 < max(steps) < STEPS
    assert not (tmp_path / "preempted" / "model").exists()
    run_job(tmp_path / "preempted")
    assert_same_end(tmp_path / "whole", tmp_path / "preempted")


@pytest.mark.slow
def test_job_whose_collectives_fail_ends_with_one_line_and_no_waiting(tmp_path):
    status, errors = finish(start_job(tmp_path, break_at=25))
    assert status == [distributed.STATUS_LOST_PEER] * 2, errors
    for error in errors:
        assert error.startswith("dar_jax: error: the job broke off") and error.count("\n") == 1
        assert re.search(r"Connection closed by peer; the last good .*/checkpoints/[12]0; ", error)


def command_line(*arguments):
    return ["-m", "dar_jax.main", "--config=configs/mnist.py:tokenizer", *arguments]


@pytest.mark.slow
def test_processes_with_different_configs_are_refused(tmp_path):
    join = [f"--coordinator_address={free_address()}", "--num_processes=2"]
    workdir = f"--workdir={tmp_path / 'new'}"
    rates = ("--config.optimizer.learning_rate=0.5", "--config.optimizer.learning_rate=0.25")
    status, errors = finish(
        [
            start(command_line(workdir, *join, f"--process_id={process}", rate))
            for process, rate in enumerate(rates)
        ]
    )
    assert status == [2, 2]
    message = "process 1 has config.optimizer.learning_rate=0.25, process 0 has 0.5; start all"
    for error in errors:
        assert f"dar_jax: error: {message}" in error and "Traceback" not in error
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_workdir_that_is_not_shared_is_one_line(tmp_path):
    config = f"--config={ROOT / 'configs' / 'mnist.py'}:tokenizer"
    join = [f"--coordinator_address={free_address()}", "--num_processes=2", "--workdir=run"]
    processes = []
    for process in range(2):
        (tmp_path / str(process)).mkdir()
        command = ["-m", "dar_jax.main", config, *join, f"--process_id={process}"]
        processes.append(start(command, tmp_path / str(process)))
    status, errors = finish(processes)
    assert status == [2, 2], errors
    for process, error in enumerate(errors):
        workdir = tmp_path / str(process) / "run"
        message = f"workdir {workdir} is on process 1 another directory than on process 0"
        assert f"dar_jax: error: {message}" in error and "Traceback" not in error
        assert not list(workdir.iterdir())


@pytest.mark.slow
def test_workdir_of_another_run_is_one_line_on_all_processes(tmp_path):
    join = [f"--coordinator_address={free_address()}", "--num_processes=2"]
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        arguments = [f"--workdir={tmp_path}", *join]
        status, errors = finish(
            [start(command_line(*arguments, f"--process_id={process}")) for process in range(2)]
        )
    assert status == [2, 2], errors
    for error in errors:
        assert "dar_jax: error: another run is at work in" in error and "Traceback" not in error


def test_coordinator_that_does_not_answer_is_one_line_in_time(tmp_path):
    join = [f"--coordinator_address={free_address()}", "--num_processes=2", "--process_id=1"]
    arguments = [f"--workdir={tmp_path / 'new'}", *join, "--join_timeout=1"]
    status, (error,) = finish([start(command_line(*arguments))])
    assert status == [2]
    assert error.count("\n") == 1 and "did not all meet at 127.0.0.1:" in error and "1 s" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:1", None, 0), "belong together; got localhost:1, None, 0"),
        (("localhost", 2, 0), "'localhost' must be HOST:PORT"),
        (("localhost:1", 2, 2), "process_id 2 must be from 0 to num_processes - 1 = 1"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        distributed.initialize(*arguments, timeout_s=1.0)


def test_a_process_alone_joins_nothing(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node1")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    distributed.initialize(None, None, None, timeout_s=1.0)
    distributed.check_same_everywhere({"config": {"a": 1}})
    assert not distributed.jax.distributed.is_initialized()
