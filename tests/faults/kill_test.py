"""Commands that are killed, interrupted or out of space at any moment, and run again.

What is there in the end equals what an undisturbed run leaves, with nothing beside it. `KILLS` in
the environment says how often each is disturbed.
"""

import functools
import hashlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
KILLS = int(os.environ.get("KILLS", "1"))
SMALL = 2**13
"""Bytes; less than the files that are written."""
MNIST = "--config=configs/mnist.py:"
COMMANDS = {
    "train": (
        f"{MNIST}dar --config.tokenizer=package://mnist/tokenizer --config.model.dim=32 "
        "--config.model.num_layers=1 --config.model.ffn_dim=32 --config.data.batch_size=4 "
        "--config.train.steps=12 --config.train.log_every=1 --config.train.checkpoint_every=3 "
        "--config.train.image_every=0"
    ),
    "sample": f"{MNIST}dar --config.sample.num_images=20 --config.sample.batch_size=2",
    "cache": f"{MNIST}tokenizer --config.cache.kind=images --config.cache.pictures_per_shard=512",
    "evaluate": (
        f"{MNIST}dar --config.evaluate.evaluators=generation,previews "
        "--config.evaluate.num_images=20 --config.sample.batch_size=4"
    ),
}
QUICK = [("cache", signal.SIGKILL)]
DISTURBED = [
    pytest.param(mode, number, marks=() if (mode, number) in QUICK else pytest.mark.slow)
    for mode in COMMANDS
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
]
PASSING = ("checkpoints/", ".lock", "events.")
"""What tells of the way, not of the result; the state in checkpoints is in the model as well."""


def start(mode, workdir, limit=None):
    def prepare():
        # As in a terminal; a shell's background jobs would ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [
            *(sys.executable, "-m", "dar_jax.main", f"--mode={mode}", f"--workdir={workdir}"),
            *COMMANDS[mode].split(),
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )


def finish(mode, workdir):
    process = start(mode, workdir)
    _, error = process.communicate()
    assert process.returncode == 0, error


def content(workdir):
    """Digests of all files that a command promises; of metrics, the lines without timings."""
    found = {}
    for path in sorted(pathlib.Path(workdir).rglob("*")):
        name = path.relative_to(workdir).as_posix()
        if not path.is_file() or any(part in name for part in PASSING):
            continue
        data = path.read_bytes()
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in data.splitlines()]
            kept = [{k: v for k, v in line.items() if "perf/" not in k} for line in lines]
            data = json.dumps(kept).encode()
        if path.suffix == ".html":  # says where the run is
            data = data.replace(str(workdir).encode(), b"WORKDIR")
        found[name] = hashlib.sha256(data).hexdigest()
    return found


@functools.cache
def undisturbed(mode, folder):
    """What is there after a run, and the seconds that it took."""
    began = time.monotonic()
    finish(mode, folder)
    return content(folder), time.monotonic() - began


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("undisturbed")


@pytest.mark.parametrize(("mode", "number"), DISTURBED)
def test_disturbed_command_ends_like_an_undisturbed_one(mode, number, folder, tmp_path):
    """As often as `KILLS` says; where a command ends before it is disturbed, another one begins."""
    expected, seconds = undisturbed(mode, folder / mode)
    when = random.Random(int(number))
    done = 0
    while done < KILLS:
        workdir, ended = tmp_path / f"after_{done}", False
        while not ended and done < KILLS:
            process = start(mode, workdir)
            try:
                _, error = process.communicate(timeout=when.uniform(0.2, 0.9) * seconds)
                ended = True
                assert process.returncode == 0, error
            except subprocess.TimeoutExpired:
                process.send_signal(number)
                _, error = process.communicate()
                done += 1
            assert "Traceback" not in error, error
            assert len(error.splitlines()) <= 1 or number == signal.SIGKILL, error
        if not ended:
            finish(mode, workdir)
        assert content(workdir) == expected
        shutil.rmtree(workdir)


@pytest.mark.slow
@pytest.mark.parametrize("mode", COMMANDS)
def test_full_disk_is_one_line_and_the_command_goes_on_later(mode, folder, tmp_path):
    expected, _ = undisturbed(mode, folder / mode)
    process = start(mode, tmp_path / "full", limit=SMALL)
    _, error = process.communicate()
    (line,) = error.splitlines()
    assert process.returncode == 2 and line.startswith("dar_jax: error: "), error
    finish(mode, tmp_path / "full")
    assert content(tmp_path / "full") == expected
