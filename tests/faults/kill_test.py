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
import shutil
import signal
import time

import pytest

from tests.faults import command

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
MOST_IN_A_ROW = 8
"""Times that a command is killed before it may end: often enough it would never."""


class Started:
    """A command at work."""

    def __init__(self, mode, workdir, limit=None):
        workdir.parent.mkdir(exist_ok=True)
        self.errors = workdir.with_name(f"{workdir.name}.errors")
        programs = workdir.parents[1] / "programs"
        arguments = [f"--mode={mode}", f"--workdir={workdir}", *COMMANDS[mode].split()]
        self.process = command.server().Process(
            target=command.run, args=(arguments, str(self.errors), str(programs), limit)
        )
        self.process.start()

    def ended(self, timeout=None):
        """Wait; tell whether it has ended."""
        self.process.join(timeout)
        return self.process.exitcode is not None

    def said(self):
        """Its status, and what it wrote to standard error."""
        self.process.join()
        return self.process.exitcode, self.errors.read_text() if self.errors.exists() else ""

    def send(self, number):
        os.kill(self.process.pid, number)


def finish(mode, workdir):
    status, error = Started(mode, workdir).said()
    assert status == 0, error


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
    """What is there after a run, and the seconds that it takes once its programs are compiled."""
    finish(mode, folder / "first")
    began = time.monotonic()
    finish(mode, folder / "second")
    return content(folder / "second"), time.monotonic() - began


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("commands")


@pytest.mark.parametrize(("mode", "number"), DISTURBED)
def test_disturbed_command_ends_like_an_undisturbed_one(mode, number, folder):
    """As often as `KILLS` says; where a command ends before it is disturbed, another one begins."""
    expected, seconds = undisturbed(mode, folder / mode)
    when = random.Random(int(number))
    done = 0
    while done < KILLS:
        workdir, ended, here = folder / f"{mode}_{number}" / f"after_{done}", False, 0
        while not ended and done < KILLS and here < MOST_IN_A_ROW:
            started = Started(mode, workdir)
            ended = started.ended(timeout=when.uniform(0, 1) * seconds)
            if not ended:
                started.send(number)
                done, here = done + 1, here + 1
            status, error = started.said()
            assert status == 0 or not ended, error
            assert "Traceback" not in error, error
            assert len(error.splitlines()) <= 1 or number == signal.SIGKILL, error
        if not ended:
            finish(mode, workdir)
        assert content(workdir) == expected
        assert not [*workdir.rglob("*tmp*")], "litter in the checkpoints"
        shutil.rmtree(workdir)


@pytest.mark.slow
@pytest.mark.parametrize("mode", COMMANDS)
def test_full_disk_is_one_line_and_the_command_goes_on_later(mode, folder):
    expected, _ = undisturbed(mode, folder / mode)
    workdir = folder / "full" / mode
    status, error = Started(mode, workdir, limit=SMALL).said()
    (line,) = error.splitlines()
    assert status == 2 and line.startswith("dar_jax: error: "), error
    finish(mode, workdir)
    assert content(workdir) == expected
