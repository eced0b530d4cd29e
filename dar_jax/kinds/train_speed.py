"""Train steps, encoding, and the reading of their data, timed for `--mode=benchmark`.

All of it with random weights, and, but for reading, with black pictures, which take as long.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dar_jax.common.image import to_float
from dar_jax.common.typing import Array, Params
from dar_jax.data.pipeline import train_iterator
from dar_jax.kinds import find_kind
from dar_jax.kinds.loading import build_task, frozen_model
from dar_jax.kinds.train_step import TrainBlocks, train_step, with_remat
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.parallel.sharding import batch_part, make_mesh
from dar_jax.performance.device_speed import memory_bytes
from dar_jax.performance.program_speed import RUNS, time_model, time_program
from dar_jax.training.state import create_state


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

    def start(compiled: Any) -> Callable[[], Any]:
        task = build_task(config, with_weights=False)
        state = create_state(task, config.optimizer, jax.random.key(seed), mesh=mesh)
        batch, frozen = jax.tree.map(_zeros, program.arguments[1:])

        def step() -> Any:
            nonlocal state
            state, update = compiled(state, batch, frozen)
            return update

        return step

    return {"remat": config.compute.remat, **time_program(program, start, mesh, repeats)}


def time_encoding(config: TrainBlocks, seed: int, repeats: int) -> dict[str, Any]:
    """Encode the pictures of a batch, with the model or the tokenizer or autoencoder it needs.

    Args:
        config: the model and its batch.
        seed: of the parameters.
        repeats: timed runs, of which the median counts.
    """
    kind = find_kind(config.task, "config.task")
    model: FunctionalModel[Any] = FunctionalModel(
        kind.module, config.model, kind.compute_of(config.compute)
    )
    for name, companion in kind.companions.items():
        path = config.companions[name]
        model = frozen_model(companion, path, config.compute, with_weights=False).model

    def encode(params: Params, pixels: Array) -> Any:
        with model.in_float32(params) as module:
            return module.encode(to_float(pixels))

    data = config.data
    shape = (data.batch_size, data.image_size, data.image_size, 3)
    return time_model(encode, model, shape, seed=seed, repeats=repeats)


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
            for _ in range(RUNS):
                next(iterator)
            times.append(time.perf_counter() - start)
    finally:
        iterator.close()
    batch_size = config.data.batch_size
    return {
        "batch_size": batch_size,
        "images_per_second": RUNS * batch_size / statistics.median(times),
    }


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(like.shape, like.dtype, device=like.sharding)
