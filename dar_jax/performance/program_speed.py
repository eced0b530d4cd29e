"""Timed runs of compiled programs on all devices: `--mode=benchmark` of what is not sampling."""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dar_jax.common.flops import traced_flops
from dar_jax.common.typing import Array, Params
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.parallel import sharding
from dar_jax.performance.device_speed import timed
from dar_jax.performance.programs import Program, abstract, memory_of
from dar_jax.training.metrics import performance

RUNS = 5
"""Calls of one timed run: they are under way together, as in use."""


def time_program(
    program: Program, start: Callable[[Any], Callable[[], Any]], mesh: Mesh, repeats: int
) -> dict[str, Any]:
    """Compile a program, run it and return the figures of one call.

    Args:
        program: what is timed.
        start: maps the compiled program to what calls it once.
        mesh: of the devices that share its images.
        repeats: timed runs, of which the median counts.
    """
    traced = program.function.trace(*program.arguments, **program.options)
    compiled, compile_seconds = timed(lambda: traced.lower().compile())
    call = start(compiled)

    def run() -> Any:
        return [call() for _ in range(RUNS)][-1]

    timed(run)
    seconds = statistics.median(timed(run)[1] for _ in range(repeats)) / RUNS
    model_flops = program.model_flops or traced_flops(traced.jaxpr)
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "batch_size": program.images,
        "compile_seconds": compile_seconds,
        **performance(
            seconds, program.images, model_flops / program.images, list(mesh.devices.flat)
        ),
        "memory": memory_of(compiled)["total"],
        "peak_memory": stats.get("peak_bytes_in_use"),
    }


def time_model(
    function: Callable[[Params, Array], Any],
    model: FunctionalModel,
    pixels: tuple[int, int, int, int],
    *,
    seed: int,
    repeats: int,
) -> dict[str, Any]:
    """Time a function of random weights and of black images, split over all devices.

    Args:
        function: of parameters and uint8 [B, H, W, 3].
        model: whose parameters they are.
        pixels: shape of the images.
        seed: of the weights.
        repeats: see `time_program`.
    """
    mesh = sharding.make_mesh(sharding.MeshConfig())
    sharding.check_batch_size(pixels[0], mesh)
    everywhere, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    params = abstract(model.abstract_params(), everywhere)
    images = jax.ShapeDtypeStruct(pixels, jnp.uint8, sharding=split)
    program = Program("model", jax.jit(function), (params, images), {}, pixels[0])

    def start(compiled: Any) -> Callable[[], Any]:
        weights = jax.jit(model.init, out_shardings=everywhere)(jax.random.key(seed))
        return functools.partial(compiled, weights, jnp.zeros(pixels, jnp.uint8, device=split))

    return time_program(program, start, mesh, repeats)
