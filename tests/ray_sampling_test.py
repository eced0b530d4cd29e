"""A set of images on a local Ray cluster of two nodes, one of whose actors is killed."""

import importlib.util
import os
import pathlib
import signal
import sys
import threading
import time

import numpy as np
import pytest

import dar_jax
from dar_jax.generation.config import SampleConfig
from dar_jax.generation.image_set import PIXELS, ImageSet
from dar_jax.generation.image_sets import fill
from tests import tiny_model

pytest.importorskip("ray", reason="needs dar-jax[ray]")
pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
COUNT, BATCH = 200, 8
WAIT_SECONDS = 300


@pytest.fixture
def cluster():
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def our_actors():
    """Processes of actors that are below this one."""
    parents, names = {}, {}
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            names[int(path.name)] = (path / "cmdline").read_bytes()
            status = (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(path.name)] = int(status[1])
    for process, name in names.items():
        above = process
        while above in parents and above != os.getpid():
            above = parents[above]
        if above == os.getpid() and name.startswith(b"ray::Sampler"):
            yield process


def test_set_of_two_nodes_one_of_whose_actors_is_killed_equals_the_own_one(
    cluster, tmp_path, monkeypatch
):
    model = tiny_model.save(tmp_path / "models")
    spec = importlib.util.spec_from_file_location("ray_sampling", ROOT / "launch/ray_sampling.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    words = [f"--model={model}", f"--out={tmp_path}/sets", f"--num_images={COUNT}", "--actors=2"]
    words += [f"--batch_size={BATCH}", "--sampling", "{}", '{"guidance_scale": 2.0}']
    monkeypatch.setattr(sys, "argv", ["ray_sampling.py", *words])
    running = threading.Thread(target=script.main)
    running.start()
    end = time.monotonic() + WAIT_SECONDS
    while len([*(tmp_path / "sets").glob("*/*-*.npz")]) < 2:
        assert running.is_alive() and time.monotonic() < end
        time.sleep(0.01)
    victim, *others = our_actors()
    assert others
    os.kill(victim, signal.SIGKILL)
    running.join(WAIT_SECONDS)
    assert not running.is_alive()

    pipeline = dar_jax.from_pretrained(model)
    for number, options in enumerate(({}, {"guidance_scale": 2.0})):
        own = ImageSet(tmp_path / f"own{number}", COUNT, tuple(range(tiny_model.NUM_CLASSES)))
        own.bind({})
        fill(own, pipeline, SampleConfig(batch_size=BATCH, options=options))
        with np.load(tmp_path / f"sets/{number}/samples_{COUNT}.npz") as drawn:
            np.testing.assert_array_equal(drawn["arr_0"], own.array(PIXELS))
            np.testing.assert_array_equal(drawn["arr_1"], own.labels_of(0, COUNT))
