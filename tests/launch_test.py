"""The launch scripts: the commands they would run, and two of them for real on a CPU."""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

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
