"""Every form of data set, end to end: each picture once per epoch, through kill and resume."""

import dataclasses
import multiprocessing
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dar_jax.data import pipeline
from dar_jax.data.sources import DataConfig, load_source
from tests.data import tiny_sets
from tests.data.tiny_sets import CLASSES, NUM_PICTURES

ROOT = pathlib.Path(__file__).parents[2]
BATCH_SIZE = 4


@pytest.fixture(scope="module", params=tiny_sets.FORMS)
def config(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "set"
    kind = tiny_sets.FORMS[request.param](root)
    return DataConfig(
        **kind,
        path=str(root),
        image_size=12,
        crop="random",
        flip=True,
        batch_size=BATCH_SIZE,
        num_threads=2,
    )


def shown(batch):
    """The numbers of a batch's pictures, whose labels must be theirs."""
    found = tiny_sets.numbers(batch["pixels"])
    assert batch["label"].tolist() == [number % len(CLASSES) for number in found]
    return found


def test_every_picture_occurs_once_per_epoch_through_kill_and_resume(config):
    num_train = len(load_source(config, "train"))
    iterator = pipeline.train_iterator(config, seed=0)
    seen = [shown(next(iterator)) for _ in range(3)]
    state = iterator.get_state()
    next(iterator)  # done, but lost with the killed run
    iterator.close()
    iterator = pipeline.train_iterator(config, seed=0)
    iterator.set_state(state)
    seen += [shown(next(iterator)) for _ in range(num_train)]
    iterator.close()
    epochs = np.reshape(np.concatenate(seen)[: 4 * num_train], (4, num_train))
    expected = sorted(epochs[0])
    assert len(set(expected)) == num_train
    assert [sorted(epoch) for epoch in epochs] == [expected] * 4
    assert epochs[0].tolist() != epochs[1].tolist()


def test_parts_of_two_processes_are_disjoint_and_make_one_epoch(config):
    num_train = len(load_source(config, "train"))
    num_batches = num_train // BATCH_SIZE
    parts = []
    for index in range(2):
        iterator = pipeline.train_iterator(config, 0, (index, 2))
        parts.append({n for _ in range(num_batches) for n in shown(next(iterator))})
        iterator.close()
    assert not parts[0] & parts[1]
    assert len(parts[0] | parts[1]) == num_batches * BATCH_SIZE


def test_held_out_pictures_are_the_rest_and_come_in_a_mixed_order(config):
    train, test = load_source(config, "train"), load_source(config, "test")
    held_out = [n for batch in pipeline.eval_batches(config, "test") for n in shown(batch)]
    kept = [n for batch in pipeline.eval_batches(config, "train") for n in shown(batch)]
    assert len(train) + len(test) == NUM_PICTURES
    assert sorted(kept + held_out) == list(range(NUM_PICTURES))


def test_source_keeps_its_sizes_names_and_files(config):
    source = load_source(config, "train")
    assert source.num_classes == 3 and source.class_names in (CLASSES, ("0", "1", "2"))
    copy = pickle.loads(pickle.dumps(source))
    shapes = set()
    for index in range(len(source)):
        example = copy[index]
        shapes.add(example["pixels"].shape)
        picture = source.read(index)
        assert picture.label == example["label"] and picture.data.startswith(b"\x89PNG")
        assert picture.name
    assert len(shapes) == len(source)


READ_AND_LEAVE = """
import multiprocessing, os, sys
from dar_jax.data import pipeline
from dar_jax.data.base import DataConfig

if __name__ == "__main__":
    config = DataConfig(source="folder", path=sys.argv[1], image_size=12, num_workers=2)
    iterator = pipeline.train_iterator(config, seed=0)
    next(iterator)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    os._exit(0)  # as a killed process does
"""


@pytest.mark.slow
def test_worker_processes_end_with_the_one_that_reads(tmp_path):
    tiny_sets.make_folder(tmp_path / "set")
    script = tmp_path / "script.py"
    script.write_text(READ_AND_LEAVE)
    command = [sys.executable, str(script), str(tmp_path / "set")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, check=True, text=True, stdout=subprocess.PIPE)
    workers = [pathlib.Path("/proc") / pid for pid in done.stdout.split()]
    assert len(workers) == 2
    for _ in range(100):
        if not any((each / "fd").exists() and list((each / "fd").iterdir()) for each in workers):
            return
        time.sleep(0.1)
    raise AssertionError(f"{workers} are still at work")


@pytest.mark.slow
def test_worker_processes_give_the_batches_of_threads_and_pass_errors_on(tmp_path):
    kind = tiny_sets.make_folder(tmp_path)
    config = DataConfig(**kind, path=str(tmp_path), image_size=12, crop="random", batch_size=4)
    threads, workers = (
        pipeline.train_iterator(dataclasses.replace(config, num_workers=count), seed=0)
        for count in (0, 2)
    )
    threads.set_state({"next_index": 3})
    workers.set_state({"next_index": 3})
    for number in range(9):
        np.testing.assert_equal(next(workers), next(threads))
        if number == 2:  # what a terminal or a scheduler sends to the whole group
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGINT)
                os.kill(process.pid, signal.SIGTERM)
    threads.close()
    workers.close()

    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"")
    workers = pipeline.train_iterator(dataclasses.replace(config, num_workers=2), seed=0)
    with pytest.raises(ValueError, match="cannot be read"):
        next(workers)
    workers.close()
