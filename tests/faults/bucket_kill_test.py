"""Every mode with its workdir in a bucket: undisturbed, and killed at any moment and run again.

What is there in the end equals what an undisturbed run leaves in a folder, with nothing beside it.
`KILLS` in the environment says how often each is killed, `SEED` when.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import random
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from dar_jax.common import storage
from dar_jax.training import checkpoint
from tests import tiny_model, tiny_transdiff
from tests.data import tiny_sets
from tests.emulator import readable

ROOT = pathlib.Path(__file__).parents[2]
KILLS = int(os.environ.get("KILLS", "1"))
SEED = int(os.environ.get("SEED", "0"))
MAX_DELAY_S = 0.3
"""Between the object after which a kill is due and the kill."""
TIMEOUT_S = 300
PASSING = ("checkpoints/", "events.", ".lock")
VARYING = ("seconds", "perf/", "time", "speed")
"""Parts of names of figures that no two runs have in common."""


def model_flags(config):
    """The architecture of a dataclass as keys on the command line."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from (f"{name}.{inner}" for inner in model_flags(value))
        elif value not in (None, ()):
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            yield f"{name}={text}"


def architecture(config):
    return [f"--config.model.{flag}" for flag in model_flags(dataclasses.asdict(config))]


SYNTHETIC = ("--config.data.source=synthetic", f"--config.data.image_size={tiny_model.SIZE}")
TRAIN = (
    *("--mode=train", "--config.train.steps=8", "--config.train.log_every=1"),
    *("--config.train.checkpoint_every=2", "--config.train.image_every=4"),
    *("--config.data.batch_size=4", "--config.optimizer.warmup_steps=2"),
)
TOKENIZER = ("--config=configs/mnist.py:tokenizer", *SYNTHETIC)
PRIOR = ("--config=configs/mnist.py:dar", *SYNTHETIC, "--config.tokenizer={models}/dar_tokenizer")
VAE = ("--config=configs/mnist.py:kl_vae", "--config.data.source=synthetic")
TRANSDIFF = ("--config=configs/mnist.py:transdiff", "--config.vae={models}/vae")
PICTURES = ("--config.data.source=folder", "--config.data.path={data}")
DRAWN = (*PRIOR, "--config.sample.model={models}/dar_prior", "--config.sample.batch_size=4")
SHARDS = ("--mode=cache", "--config.cache.pictures_per_shard=4")
COMMANDS = {
    "train_tokenizer": (*TOKENIZER, *architecture(tiny_model.TOKENIZER), *TRAIN),
    "train_prior": (*PRIOR, *architecture(tiny_model.PRIOR), *TRAIN),
    "train_and_evaluate": (
        *(*PRIOR, *architecture(tiny_model.PRIOR), *TRAIN, "--config.train.evaluate_every=4"),
        *("--config.evaluate.evaluators=generation", "--config.evaluate.num_images=8"),
        "--config.sample.batch_size=4",
    ),
    "train_kl_vae": (
        *(*VAE, "--config.data.image_size=8", *architecture(tiny_transdiff.VAE), *TRAIN),
    ),
    "train_transdiff": (
        *(*TRANSDIFF, "--config.data.source=synthetic", "--config.data.image_size=8"),
        *(*architecture(tiny_transdiff.ONE_STEP), "--config.model.num_classes=10", *TRAIN),
    ),
    "export": (*PRIOR, *architecture(tiny_model.PRIOR), *TRAIN[1:], "--mode=export"),
    "set": (*DRAWN, "--mode=sample", "--config.sample.num_images=40"),
    "set_of_files": (
        *(*DRAWN, "--mode=sample", "--config.sample.num_images=40", "--config.sample.format=png"),
    ),
    "grid": (*DRAWN, "--mode=sample", "--config.sample.images_per_class=4"),
    "variations": (
        *(*DRAWN, "--mode=sample", "--config.sample.prefix_image=test:3"),
        "--config.sample.labels=3",
        *("--config.sample.variations=2", "--config.sample.prefix_tokens=1,4"),
    ),
    "evaluate": (
        *(*DRAWN, "--mode=evaluate", "--config.evaluate.num_images=40"),
        "--config.evaluate.evaluators=generation,previews,reconstruction,likelihood,guidance",
        "--config.evaluate.guidance_scales=((1.0,),(2.0,))",
    ),
    "cache_images": (*TOKENIZER, *PICTURES, *SHARDS),
    "cache_codes": (*PRIOR, *PICTURES, *SHARDS, "--config.cache.kind=codes"),
    "cache_latents": (
        *(*TRANSDIFF, *PICTURES, *SHARDS, "--config.data.image_size=8"),
        "--config.cache.kind=latents",
    ),
    "cache_references": (
        *(*TRANSDIFF, *PICTURES, *SHARDS, "--config.data.image_size=8"),
        *("--config.cache.kind=references", "--config.data.num_references=2"),
    ),
    "to_torch": (
        *(*PRIOR, "--mode=convert", "--config.convert.to=torch"),
        "--config.convert.source={models}/dar_prior",
    ),
    "convert": (
        *(*PRIOR, *architecture(tiny_model.PRIOR), "--mode=convert"),
        "--config.convert.source={local}/dar_prior.safetensors",
    ),
    "compile": (*PRIOR, *architecture(tiny_model.PRIOR), "--mode=compile"),
    "benchmark": (
        *(*DRAWN, "--mode=benchmark", "--config.benchmark.model={models}/dar_prior"),
        *("--config.benchmark.batch_sizes=1,2", "--config.benchmark.repeats=1"),
    ),
}
BEFORE = {"export": ("train_prior", "--config.train.steps=4")}
"""What another command leaves in the workdir before."""
QUICK = ("set",)
LONG = ("train_prior", "train_and_evaluate", "set", "evaluate", "cache_codes")
OUTAGES = (2, 5, 7)
"""Objects after which the bucket is gone for a while."""
OUTAGE_S = 3.0
MODES = [pytest.param(m, marks=() if m in QUICK else pytest.mark.slow) for m in COMMANDS]


@pytest.fixture(scope="module")
def addresses(emulator, tmp_path_factory):
    """Where models and pictures are: in the bucket; and a local folder of the test's."""
    local = tmp_path_factory.mktemp("local")
    tiny_model.save(local / "models")
    tiny_transdiff.save_vae(local / "models")
    tiny_sets.make_folder(local / "data")
    for name in ("models", "data"):
        storage.upload_tree(
            local / name, storage.to_path(f"{emulator.scheme}://bucket/kill/{name}")
        )
    found = {name: f"{emulator.scheme}://bucket/kill/{name}" for name in ("models", "data")}
    found |= {"local": local, "cwd": local}
    finish("to_torch", local, found)
    found["cwd"] = local / "here"
    found["cwd"].mkdir()
    yield found
    assert not [*found["cwd"].iterdir()], "a folder that is named after a scheme"


def start(mode, workdir, addresses, *more):
    """Start a command with a cache of data of its own."""
    words = [*COMMANDS[mode], *more, f"--config.data.cache_dir={addresses['local']}/cache"]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "dar_jax.main", f"--workdir={workdir}"),
            *(word.format(**addresses) for word in words),
        ],
        cwd=addresses["cwd"],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_COMPILATION_CACHE_DIR": f"{addresses['local']}/programs",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(mode, workdir, addresses, *more):
    process = start(mode, workdir, addresses, *more)
    _, error = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, error


def prepare(mode, workdir, addresses):
    if mode in BEFORE:
        before, *more = BEFORE[mode]
        finish(before, workdir, addresses, *more)
        for name in ("model", "report.html"):
            path = storage.to_path(str(workdir)) / name
            storage.delete_tree(path) if path.is_dir() else path.unlink()


def content(workdir):
    """All that a command promises, by name: digests, figures, and states of checkpoints."""
    root, found = storage.to_path(str(workdir)), {}
    for path in storage.files_below(root):
        name, data = path.relative_to(root).as_posix(), path.read_bytes()
        if name.startswith(PASSING):
            continue
        if name == "benchmark.jsonl":  # all of which is measured
            data = b"".join(str([*json.loads(line)]).encode() for line in data.splitlines())
        elif path.suffix in (".json", ".jsonl"):
            lines = data.splitlines() if path.suffix == ".jsonl" else [data]
            data = json.dumps([without_times(json.loads(line)) for line in lines]).encode()
        if path.suffix == ".html":  # says where the run is
            data = data.replace(str(workdir).encode(), b"WORKDIR")
        found[name] = hashlib.sha256(data).hexdigest()
    steps = root / "checkpoints"
    found["checkpoints"] = sorted(path.name for path in storage.entries(steps))
    if (step := checkpoint.latest_step(steps)) is not None:
        found["state"] = state(steps / str(step))
    return found


def without_times(values):
    if isinstance(values, dict):
        kept = {k: v for k, v in values.items() if not any(part in k for part in VARYING)}
        return {name: without_times(value) for name, value in kept.items()}
    return [*map(without_times, values)] if isinstance(values, list) else values


def state(directory):
    """Digest of a checkpoint's state, and its position in the data."""
    with readable(directory) as copy, checkpoint.ocp.StandardCheckpointer() as reader:
        restored = reader.restore(copy / "state")
    restored["rng"] = jax.random.key_data(restored["rng"])
    leaves = jax.tree_util.tree_leaves_with_path(restored)
    arrays = [(jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in leaves]
    digest = hashlib.sha256()
    for name, array in arrays:
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest(), (directory / "data" / "metadata").read_text()


def kill_after(process, emulator, workdir, num_objects, delay):
    """Kill a process when so many objects are there, and some time later; False: it had ended."""
    end = time.monotonic() + TIMEOUT_S
    while process.poll() is None and time.monotonic() < end:
        if emulator.count(workdir) >= num_objects:
            time.sleep(delay)
            process.kill()
            break
        time.sleep(0.02)
    _, error = process.communicate()
    assert process.returncode in (0, -9), error
    return process.returncode == -9


@pytest.fixture
def undisturbed(addresses, tmp_path):
    """What a command leaves in a folder."""

    def content_of(mode):
        prepare(mode, tmp_path / "undisturbed", addresses)
        finish(mode, tmp_path / "undisturbed", addresses)
        return content(tmp_path / "undisturbed")

    return content_of


@pytest.mark.parametrize("mode", MODES)
def test_mode_in_a_bucket_ends_as_in_a_folder_after_kills_too(
    mode, addresses, emulator, in_bucket, undisturbed
):
    expected = undisturbed(mode)
    when, total = random.Random(SEED), 0
    for number in range(KILLS + 1):
        workdir = f"{in_bucket}/{number}"
        prepare(mode, workdir, addresses)
        begun, moment = emulator.count(workdir), None
        while number and (moment is None or when.random() < 0.5):
            begun = max(begun, emulator.count(workdir))
            moment = when.randint(begun, max(begun, total)), when.uniform(0, MAX_DELAY_S)
            process = start(mode, workdir, addresses)
            if not kill_after(process, emulator, workdir, *moment):
                break
        finish(mode, workdir, addresses)
        total = total or emulator.count(workdir)
        assert content(workdir) == expected, f"{number}, killed after {moment}"


@pytest.mark.slow
@pytest.mark.parametrize("mode", LONG)
def test_bucket_that_is_gone_for_a_while_costs_nothing(
    mode, addresses, emulator, in_bucket, undisturbed
):
    expected, workdir = undisturbed(mode), str(in_bucket)
    process = start(mode, workdir, addresses)
    for num_objects in OUTAGES:
        while emulator.count(workdir) < num_objects:
            assert process.poll() is None, "it ended too early to be disturbed"
            time.sleep(0.02)
        emulator.kill()
        time.sleep(OUTAGE_S)
        emulator.start()
    _, error = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, error
    assert content(workdir) == expected
