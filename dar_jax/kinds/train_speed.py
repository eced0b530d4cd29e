"""Timed train steps of `--mode=benchmark`, and the speed at which their data can be read.

Both know no weights and no pictures that a run would need: the step gets zeros, which take as long.
"""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from dar_jax.data.pipeline import train_iterator
from dar_jax.kinds.loading import build_task
from dar_jax.kinds.train_step import TrainBlocks, train_step, with_remat
from dar_jax.parallel.sharding import batch_part, make_mesh
from dar_jax.performance.device_speed import memory_bytes, timed
from dar_jax.performance.programs import memory_of
from dar_jax.training.metrics import performance
from dar_jax.training.state import create_state

STEPS = 5
"""Train steps, or batches read, of one timed run."""


def time_training(config: TrainBlocks, seed: int, repeats: int) -> dict[str, Any]:
    """Compile the train step, run it on all devices and return the figures of one step.

    Args:
        config: what is trained.
        seed: of the parameters.
        repeats: timed runs, of which the median counts.
    """
    mesh = make_mesh(config.mesh)
    config = with_remat(config, mesh, memory_bytes())
    program = train_step(config, mesh)
    compiled, compile_seconds = timed(lambda: program.function.lower(*program.arguments).compile())
    task = build_task(config, with_weights=False)
    state = create_state(task, config.optimizer, jax.random.key(seed), mesh=mesh)
    batch, frozen = jax.tree.map(_zeros, program.arguments[1:])

    def run() -> Any:
        nonlocal state
        update = None
        for _ in range(STEPS):
            state, update = compiled(state, batch, frozen)
        return update

    timed(run)
    seconds = statistics.median(timed(run)[1] for _ in range(repeats)) / STEPS
    assert program.model_flops is not None
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "remat": config.compute.remat,
        "compile_seconds": compile_seconds,
        **performance(
            seconds, program.images, program.model_flops / program.images, list(mesh.devices.flat)
        ),
        "memory": memory_of(compiled)["total"],
        "peak_memory": stats.get("peak_bytes_in_use"),
    }


def time_reading(config: TrainBlocks, seed: int, repeats: int) -> dict[str, Any]:
    """Read batches as fast as they come; the first one, with which reading begins, is not timed.

    Args:
        config: what is read.
        seed: of the order.
        repeats: timed runs, of which the median counts.
    """
    iterator = train_iterator(config.data, seed, batch_part(make_mesh(config.mesh)))
    try:
        next(iterator)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            for _ in range(STEPS):
                next(iterator)
            times.append(time.perf_counter() - start)
    finally:
        iterator.close()
    images = STEPS * config.data.batch_size
    return {"images_per_second": images / statistics.median(times)}


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(like.shape, like.dtype, device=like.sharding)
