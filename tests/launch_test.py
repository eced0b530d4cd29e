"""The launch scripts: the commands they would run, and two of them for real on a CPU."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from dar_jax.common.version import version

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), ROOT / "launch/slurm.sbatch", ROOT / ".ci/run"])
VENV = pathlib.Path(sys.executable).parents[1]
MAX_LINES = 40
START_TIMEOUT_S = 300
SMALL = [
    *(f"--config.model.{part}.dim=32" for part in ("encoder", "condition", "decoder")),
    "--config.compute.unroll=False",
    "--config.data.batch_size=4",
    "--config.train.log_every=1",
    "--config.train.image_every=0",
]
"""A model and batches that compile and train in seconds."""
ARGUMENTS = ["--config=configs/imagenet_dar.py:l", "--config.sample.guidance_scale=(1.1, 8.0)"]
VARIABLES = {
    "tpu_pod.sh": dict(NAME="dar", ZONE="us-east5-b", TPU="v6e-16", RUNTIME="v2-alpha-tpuv6e"),
    "gke_xpk.sh": dict(
        NAME="dar", CLUSTER="pool", PROJECT="own", ZONE="us-east5-b", TPU="v6e-16", IMAGE="dar:tpu"
    ),
    "gpu_node.sh": {},
    "slurm.sbatch": {},
}


def run(script, *arguments, **variables):
    """Run a launch script outside the checkout; return (exit status, output, errors)."""
    environment = {"PATH": os.environ["PATH"], "VENV": str(VENV), **variables}
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / script), *arguments],
        cwd=ROOT.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def commands(script, *arguments, **variables):
    """The words of every command that a dry run prints."""
    status, output, errors = run(
        script, "--dry-run", *arguments, **{**VARIABLES[script], **variables}
    )
    assert status == 0 and not errors, errors
    return [shlex.split(line) for line in output.splitlines()]


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


def test_gpu_node_runs_one_process_and_installs_where_nothing_is(tmp_path):
    python = f"{VENV}/bin/python"
    expected = ["exec", python, "-m", "dar_jax.main", *ARGUMENTS]
    assert commands("gpu_node.sh", *ARGUMENTS) == [expected]
    venv = f"{tmp_path}/new"
    for extra in ("gpu", "gpu12"):
        _, make, install, *_ = commands("gpu_node.sh", *ARGUMENTS, VENV=venv, EXTRA=extra)
        assert make == ["python3", "-m", "venv", "--clear", venv]
        assert install[-2:] == ["--editable", f".[{extra}]"]


@pytest.mark.parametrize("script", ["gpu_node.sh", "slurm.sbatch"])
def test_flags_of_the_user_come_after_those_for_gpus(script, tmp_path):
    """The last value of a flag holds."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho $XLA_FLAGS\n")
    python.chmod(0o755)
    (tmp_path / "bin" / "srun").write_text('#!/bin/sh\nshift 2\nexec "$@"\n')
    (tmp_path / "bin" / "srun").chmod(0o755)
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "VENV": str(tmp_path)}
    for flags in ("", "--xla_gpu_enable_latency_hiding_scheduler=false"):
        status, output, _ = run(script, *ARGUMENTS, XLA_FLAGS=flags, **environment)
        assert status == 0
        assert output.split() == ["--xla_gpu_enable_latency_hiding_scheduler=true", *flags.split()]


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


MISTAKES = [
    *(
        (script, name, f"{name} is not set, e.g. {name}=")
        for script, names in VARIABLES.items()
        for name in names
    ),
    *((script, None, "no arguments for dar_jax.main") for script in VARIABLES),
]


@pytest.mark.parametrize(("script", "missing", "message"), MISTAKES)
def test_mistake_is_one_line_with_status_2(script, missing, message):
    variables = {name: v for name, v in VARIABLES[script].items() if name != missing}
    action = ["run"] if script == "tpu_pod.sh" else []
    status, output, errors = run(script, *action, **variables)
    assert status == 2 and not output
    (line,) = errors.splitlines()
    assert line.startswith(f"launch/{script}: {message}")


def test_unknown_action_and_missing_environment_are_one_line(tmp_path):
    status, _, errors = run("tpu_pod.sh", "dance", **VARIABLES["tpu_pod.sh"])
    assert status == 2 and errors.count("\n") == 1 and "unknown action 'dance'" in errors
    status, _, errors = run("slurm.sbatch", *ARGUMENTS, VENV=str(tmp_path))
    assert status == 2 and errors.count("\n") == 1 and f"{tmp_path}/bin/python is missing" in errors


@pytest.mark.parametrize("script", [*VARIABLES, "quickstart.sh", "test.sh"])
def test_help_is_the_head_of_the_script(script):
    status, output, errors = run(script, "--help")
    assert status == 0 and not errors
    assert f"launch/{script}" in output and "#" not in output.splitlines()[0]


@pytest.mark.parametrize("shell", ["sh", "zsh"])
@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_script_started_by_another_shell_goes_on_in_bash(script, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    command = [shell, str(ROOT / "launch" / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == run(script, "--help")[1] and not done.stderr


def test_quickstart_and_tests_print_what_they_would_do():
    status, output, errors = run("quickstart.sh", "--dry-run")
    assert status == 0 and not errors
    *_, tokenizer, prior, pictures, figures = map(shlex.split, output.splitlines())
    assert all(".venv/bin/python" in line for line in (tokenizer, prior, pictures, figures))
    assert "--config=configs/mnist.py:tokenizer" in tokenizer
    assert pictures == [*prior, "--mode=sample"] and figures == [*prior, "--mode=evaluate"]
    status, output, errors = run("test.sh", "--dry-run", "-k", "launch")
    assert status == 0 and not errors
    assert output.splitlines()[-1].split() == [
        *("exec", f"{VENV}/bin/python", "-m", "pytest", "-k", "launch")
    ]
    assert run("quickstart.sh", "--quick")[0] == 2


def test_emoji_come_with_npm_or_from_the_registry_that_is_named(tmp_path):
    for tool in ("bash", "dirname", "sed", "cmp"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    (tmp_path / "python3").symlink_to(sys.executable)
    package = "@lobehub/fluent-emoji-3d"
    status, _, errors = run("emoji.sh", "--dry-run", PATH=str(tmp_path))
    assert status == 2 and "npm_config_registry=URL" in errors
    named = {"PATH": str(tmp_path), "npm_config_registry": "https://registry.example/npm/"}
    status, output, errors = run("emoji.sh", "--dry-run", **named)
    assert status == 0 and "curl " in output and not errors
    assert f"https://registry.example/npm/{package}/-/fluent-emoji-3d-" in output
    (tmp_path / "npm").symlink_to(shutil.which("bash"))
    status, output, errors = run("emoji.sh", "--dry-run", **named)
    assert status == 0 and "npm pack" in output and package in output and not errors
    assert "curl" not in output


FAKE_PYTHON = """#!/bin/sh
echo "$(basename "$0") $*" >> "$LOG"
case "$*" in
  *"-m venv"*) mkdir -p "$VENV/bin"
    for name in python ruff pyright; do cp "$0" "$VENV/bin/$name"; done ;;
esac
if [ "$STOP" ]; then case "$*" in *"$STOP"*) exit 130 ;; esac; fi
"""


@pytest.fixture
def make_and_test(tmp_path):
    """Runs `test.sh` with an interpreter that only notes what it is asked."""
    python, log, venv = tmp_path / "python", tmp_path / "log", tmp_path / "venv"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)

    def make_and_test(stop=""):
        log.unlink(missing_ok=True)
        names = {"PYTHON": python, "LOG": log, "VENV": venv, "STOP": stop}
        status, _, errors = run("test.sh", **{name: str(value) for name, value in names.items()})
        return status, log.read_text() if log.exists() else "", errors

    return make_and_test


@pytest.mark.parametrize("step", ["-m venv", "pip install"])
def test_environment_whose_making_was_interrupted_is_made_anew(make_and_test, step):
    assert make_and_test(stop=step)[0] != 0
    status, notes, errors = make_and_test()
    assert status == 0, errors
    assert "-m venv --clear" in notes and "pip install" in notes and "pytest" in notes
    status, notes, _ = make_and_test()
    assert status == 0 and "-m venv" not in notes and "pip install" not in notes


def test_directory_that_is_no_environment_is_left_alone(make_and_test, tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv/precious").touch()
    status, _, errors = make_and_test()
    assert status == 2 and errors.count("\n") == 1 and "remove it" in errors
    assert (tmp_path / "venv/precious").exists()


def test_scripts_are_short_and_clean():
    shellcheck = VENV / "bin" / "shellcheck"
    done = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    for path in (*SCRIPTS, ROOT / "launch/Dockerfile"):
        assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.fixture
def start(tmp_path):
    """Starts a short training of a small tokenizer through `gpu_node.sh`."""
    command = ["bash", f"{ROOT}/launch/gpu_node.sh", "--config=configs/mnist.py:tokenizer", *SMALL]
    command += [f"--workdir={tmp_path}/run", "--config.train.steps=20"]
    environment = {**os.environ, "VENV": str(VENV)}
    started = []

    def start():
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


@pytest.mark.slow
def test_gpu_node_trains_and_after_sigterm_resumes(start, tmp_path):
    process, lines = start(), tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + START_TIMEOUT_S
    while not (lines.exists() and lines.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    assert not (tmp_path / "run/model").exists()
    assert 2 <= lines.read_text().count("\n") < 20

    assert start().wait() == 0
    assert lines.read_text().count("\n") == 20
    assert (tmp_path / "run/model/model.safetensors").exists()


def dockerfile():
    """The instructions of the Dockerfile as (name, rest of the line)."""
    text = (ROOT / "launch/Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(" ", 1)) for line in lines]


def test_dockerfile_copies_what_exists():
    steps = dockerfile()
    assert [name for name, _ in steps][:2] == ["FROM", "ARG"]
    assert steps[-1] == ("ENTRYPOINT", '["python", "-m", "dar_jax.main"]')
    for name, rest in steps:
        if name == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1])


@pytest.mark.slow
def test_docker_steps_build_something_that_runs(tmp_path):
    """The steps of the Dockerfile, in a new environment instead of an image."""
    image = tmp_path / "image"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    path = f"{tmp_path}/venv/bin:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": ""}
    for name, rest in dockerfile():
        match name:
            case "ARG":
                environment |= [rest.split("=")]
            case "WORKDIR":
                (image / rest.lstrip("/")).mkdir(parents=True)
                workdir = image / rest.lstrip("/")
            case "COPY":
                *sources, target = rest.split()
                copy = ["cp", "-rT" if target == sources[0] else "-r"]
                sources = [str(ROOT / source) for source in sources]
                subprocess.run([*copy, *sources, target], cwd=workdir, check=True)
            case "RUN":
                subprocess.run(["sh", "-ec", rest], cwd=workdir, env=environment, check=True)
            case "ENTRYPOINT":
                entrypoint = json.loads(rest)
    command = [*entrypoint, "--config=configs/mnist.py:tokenizer", "--workdir=runs/new", *SMALL]
    command += ["--config.train.steps=1"]
    subprocess.run(command, cwd=workdir, env=environment, check=True)
    assert (workdir / "runs/new/model/model.safetensors").exists()
