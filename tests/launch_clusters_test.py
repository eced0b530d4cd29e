"""Launch scripts for clusters: the commands that they would run."""

import os
import re
import shlex
import subprocess

import pytest
import yaml

from dar_jax.common.version import version
from tests.launch_test import ARGUMENTS, ROOT, VENV, commands, run


def assert_runs_main(command):
    """A shell would run `dar_jax.main` with exactly ARGUMENTS."""
    words = shlex.split(command, posix=True)
    start = words.index("dar_jax.main") + 1
    assert words[start : start + len(ARGUMENTS)] == ARGUMENTS


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        ("create", "tpu-vm create dar --accelerator-type=v6e-16 --version=v2-alpha-tpuv6e"),
        (
            "queue",
            "queued-resources create dar --accelerator-type=v6e-16 --node-id=dar"
            " --runtime-version=v2-alpha-tpuv6e",
        ),
        ("state", "queued-resources describe dar --format=value(state.state)"),
        ("delete", "tpu-vm delete dar --quiet"),
        ("unqueue", "queued-resources delete dar --force --quiet"),
        ("logs", "tpu-vm ssh dar --worker=0 --command=tail\\ -n\\ +1\\ -F\\ dar_jax/train.log"),
    ],
)
def test_tpu_pod_manages_the_slice(action, expected):
    words = ["gcloud", "compute", "tpus", *shlex.split(expected), "--zone=us-east5-b"]
    assert commands("tpu_pod.sh", action) == [words]


def test_tpu_pod_takes_spot_capacity():
    for action in ("create", "queue"):
        (command,) = commands("tpu_pod.sh", action, SPOT="1")
        assert "--spot" in command


def test_tpu_pod_copies_installs_and_runs_on_all_hosts():
    build, copy, install, start, follow = commands("tpu_pod.sh", "run", *ARGUMENTS)
    assert build[1:4] == ["-m", "pip", "wheel"] and build[-1] == f"git+file://{ROOT}"
    wheel = f"dar_jax-{version()}-py3-none-any.whl"
    lock = "launch/requirements.lock"
    assert copy[3:8] == ["tpu-vm", "scp", f"dist/{wheel}", lock, "dar:"]
    for command in (copy, install, start):
        assert "--worker=all" in command and "--zone=us-east5-b" in command
    assert "mount" not in install[7]
    assert install[7].endswith(f"-c requirements.lock './{wheel}[tpu,gcs]'")
    assert_runs_main(start[7].removeprefix("--command="))
    assert start[7].endswith("&"), "the run must outlive the connection"
    assert "--worker=0" in follow


@pytest.mark.parametrize(("statuses", "runs"), [((1, 1, 0), 3), ((2,), 1), ((143, 2), 2)])
def test_tpu_pod_starts_what_failed_again_but_no_mistake(tmp_path, statuses, runs):
    start = commands("tpu_pod.sh", "run", *ARGUMENTS)[3][7].removeprefix("--command=")
    python = tmp_path / "dar_jax/.venv/bin/python"
    python.parent.mkdir(parents=True)
    cases = " ".join(f"{number}) exit {status};;" for number, status in enumerate(statuses, 1))
    python.write_text(f"#!/bin/sh\necho >> runs; case $(wc -l < runs) in {cases} esac\n")
    python.chmod(0o755)
    script = f"sleep() {{ :; }}; {start} wait"
    subprocess.run(["bash", "-c", script], cwd=tmp_path, check=True)
    assert (tmp_path / "dar_jax/runs").read_text().count("\n") == runs


def test_wheel_of_the_package_is_named_as_the_scripts_expect():
    text = (ROOT / "setup.py").read_text()
    (found,) = re.findall(r'^ *version="(.*)",$', text, re.MULTILINE)
    assert found == version()


def test_errors_of_all_hosts_are_one_log(tmp_path):
    lines = ["I1129 step 1", "E0101 lost", "W1231 slow", "Traceback", "ValueError: no", "fine"]
    (tmp_path / "dar_jax").mkdir()
    (tmp_path / "dar_jax/train.log").write_text("\n".join(lines) + "\n")
    (command,) = commands("tpu_pod.sh", "errors")
    assert "--worker=all" in command
    (text,) = [word.partition("=")[2] for word in command if word.startswith("--command=")]
    found = subprocess.run(
        ["bash", "-c", f"HOSTNAME=host-3; {text}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.stdout == "".join(f"host-3: {lines[i]}\n" for i in (1, 2, 4))
    (command,) = commands("gke_xpk.sh", "errors")
    assert command[:3] == ["gcloud", "logging", "read"] and "pod_name:dar" in command[-1]
    pattern = re.search('textPayload=~"(.*)"', command[-1])[1]
    assert [line for line in lines if re.search(pattern, line)] == [lines[i] for i in (1, 2, 4)]


def test_gke_xpk_submits_a_workload_that_restarts():
    (command,) = commands("gke_xpk.sh", *ARGUMENTS, SLICES="4")
    assert command[:3] == ["xpk", "workload", "create"]
    flags = dict(word.split("=", 1) for word in command[3:])
    run = flags.pop("--command")
    assert_runs_main(run)
    assert run.endswith(" --preempted_status=143")
    assert flags == {
        "--workload": "dar",
        "--cluster": "pool",
        "--project": "own",
        "--zone": "us-east5-b",
        "--tpu-type": "v6e-16",
        "--num-slices": "4",
        "--docker-image": "dar:tpu",
        "--max-restarts": "100",
        "--termination-grace-period-seconds": "300",
    }


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize(("statuses", "runs"), [((1, 137, 0), 3), ((2,), 1), ((0,), 1)])
def test_skypilot_starts_what_failed_again_but_no_mistake(tmp_path, statuses, runs, nodes):
    task = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())
    assert [name for name, value in task["envs"].items() if value is None] == ["CONFIG", "WORKDIR"]
    assert "-c launch/requirements.lock" in task["setup"] and task["resources"]["use_spot"]
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    python = tmp_path / ".venv-sky/bin/python"
    python.parent.mkdir(parents=True)
    cases = " ".join(f"{number}) exit {status};;" for number, status in enumerate(statuses, 1))
    python.write_text(f'#!/bin/sh\necho "$@" >> runs; case $(wc -l < runs) in {cases} esac\n')
    python.chmod(0o755)
    variables = {"CONFIG": "a.py", "WORKDIR": "gs://b/c d", "ARGUMENTS": "--e=1 --f=2"}
    variables |= {"SKYPILOT_NUM_NODES": str(nodes), "SKYPILOT_NODE_RANK": str(nodes - 1)}
    variables |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "PATH": os.environ["PATH"]}
    script = f"sleep() {{ :; }}\n{task['run']}"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=variables, check=False)
    assert done.returncode == statuses[-1]
    lines = (tmp_path / "runs").read_text().splitlines()
    job = "--coordinator_address=10.0.0.1:8476 --num_processes=2 --process_id=1 " * (nodes == 2)
    expected = f"-m dar_jax.main --config=a.py --workdir=gs://b/c d {job}--e=1 --f=2"
    assert lines == [expected] * runs


def test_slurm_runs_a_task_per_gpu_and_requeues():
    (command,) = commands("slurm.sbatch", *ARGUMENTS)
    python, status = f"{VENV}/bin/python", "--preempted_status=143"
    srun = ["srun", "--label", "--kill-on-bad-exit=1"]
    assert command == [*srun, python, "-m", "dar_jax.main", *ARGUMENTS, status]
    text = (ROOT / "launch/slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"].startswith("TERM@")  # to the tasks, not to the script
    assert "#SBATCH --requeue" in text


@pytest.mark.parametrize(
    ("status", "before", "requeued"),
    [
        *((143, 0, True), (143, 99, True), (0, 0, False), (2, 0, False)),
        *((137, 0, True), (1, 19, True), (1, 20, False)),
    ],
)
def test_slurm_job_goes_back_to_the_queue_but_after_mistakes_or_often(
    tmp_path, status, before, requeued
):
    for name, line in (("srun", f"exit {status}"), ("scontrol", f'echo "$@" > {tmp_path}/asked')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    variables = {"SLURM_JOB_ID": "17", **({"SLURM_RESTART_COUNT": str(before)} if before else {})}
    done, _, _ = run("slurm.sbatch", *ARGUMENTS, PATH=path, **variables)
    assert done == status
    assert (tmp_path / "asked").exists() == requeued
    if requeued:
        assert (tmp_path / "asked").read_text() == "requeue 17\n"
