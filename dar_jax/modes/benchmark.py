"""`--mode=benchmark`: speed of sampling on one device, each figure beside its bound.

Or, by `config.benchmark.what`, of train steps on all devices, of reading their data, of encoding
it, or of the network that evaluation puts images through.

The bound is what the device could do at best, see `performance.runs`; its memory bandwidth and
matrix FLOP/s are measured in the same run. Everything is compiled and run once before, and a figure
is the median of the repeats.
"""

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
from absl import logging

from dar_jax.common import files, storage
from dar_jax.config import Config
from dar_jax.evaluation.features import EXTRACTORS, time_features
from dar_jax.generation.batches import check
from dar_jax.kinds import KINDS, find_kind
from dar_jax.kinds.loading import from_pretrained, random_pipeline
from dar_jax.kinds.train_speed import time_encoding, time_reading, time_training
from dar_jax.parallel.chips import chip_of
from dar_jax.performance import device_speed
from dar_jax.performance.config import BenchmarkConfig
from dar_jax.performance.device_speed import GIGA, DeviceSpeed, memory_bytes, shortfall
from dar_jax.performance.rows import Row, table
from dar_jax.performance.runs import SEED, Runs
from dar_jax.pipelines.base import Pipeline

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
SIZES = (
    *("dim", "num_layers", "encoder_depth", "decoder_depth", "latent_size", "num_references"),
    "num_steps",
)
"""What tells an architecture, and a way of sampling, from others of its family."""


def benchmark(config: Config, workdir: str) -> None:
    """Print the figures and write `WORKDIR/benchmark.jsonl`, a line per measurement.

    Raises:
        ValueError: the model cannot be read or draws no images, or a block of the config is wrong.
    """
    run = _benchmark_sampling if config.benchmark.what == "sample" else _benchmark_other
    run(config, workdir)


def _benchmark_sampling(config: Config, workdir: str) -> None:
    """Time sampling at every batch size, and say what bounds it."""
    settings, compute = config.benchmark, config.compute
    pipeline, weights = load(config)
    sampling = config.sample.sampling(pipeline.sampling)
    for scale in settings.guidance_scales:
        dataclasses.replace(sampling, guidance_scale=scale).check(pipeline.prior.config)
    options = dataclasses.asdict(sampling)
    del options["guidance_scale"]  # those of the benchmark
    path = storage.to_path(workdir) / "benchmark.jsonl"
    storage.make_directory(path.parent)

    device = jax.devices()[0]
    speeds = {}
    for dtype in {compute.dtype, compute.decode_dtype}:
        logging.info("Measuring the speed of %s in %s", device.device_kind, dtype)
        speeds[dtype] = device_speed.measure(jnp.dtype(dtype))
    speed, decode_speed = speeds[compute.dtype], speeds[compute.decode_dtype]
    warning = shortfall(speed.bandwidth, chip_of([device]))
    if warning:
        logging.warning("%s: %s", device.device_kind, warning)
    context = {
        "device": device.device_kind,
        "platform": device.platform,
        "cpu_count": os.cpu_count(),
        "jax": jax.__version__,
        "dtype": compute.dtype,
        "decode_dtype": compute.decode_dtype,
        **compute.quantized,
        "weights": weights,
        **options,
        **{name: value for name, value in vars(pipeline.prior.config).items() if name in SIZES},
        "repeats": settings.repeats,
        "bandwidth": speed.bandwidth,
        "bandwidth_warning": warning,
        "product_bandwidth": speed.product_bandwidth,
        "matmul_flops": speed.flops,
        "decode_matmul_flops": decode_speed.flops,
    }
    rows = []
    for row in measure(pipeline, settings, sampling, (speed, decode_speed)):
        rows.append(row)
        with files.replacing(path) as temporary:
            lines = (json.dumps({**row.as_json(), **context}) for row in rows)
            temporary.write_text("".join(f"{line}\n" for line in lines))
    if not rows:
        raise ValueError(f"config.benchmark.batch_sizes={settings.batch_sizes}: none fits")
    logging.info("Wrote %s\n%s\n%s", path, describe(context), table(rows))


def _benchmark_other(config: Config, workdir: str) -> None:
    """Time what `config.benchmark.what` names; write and log one line."""
    settings, device = config.benchmark, jax.devices()[0]
    measure = {
        "train": time_training,
        "encode": time_encoding,
        "data": time_reading,
        "evaluate": _time_evaluation,
    }[settings.what]
    figures = measure(config, SEED, settings.repeats)
    context = {
        "what": settings.what,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cpu_count": os.cpu_count(),
        "jax": jax.__version__,
        "dtype": config.compute.dtype,
        "repeats": settings.repeats,
    }
    path = storage.to_path(workdir) / "benchmark.jsonl"
    storage.make_directory(path.parent)
    with files.replacing(path) as temporary:
        temporary.write_text(json.dumps({**figures, **context}) + "\n")
    values = (
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in {**context, **figures}.items()
    )
    logging.info("Wrote %s\n%s", path, ", ".join(values))


def _time_evaluation(config: Config, seed: int, repeats: int) -> dict[str, Any]:
    """Time the network of `config.evaluate.features`."""
    name, side = config.evaluate.features, config.data.image_size
    if name not in EXTRACTORS:
        raise ValueError(
            f"config.evaluate.features={name!r} must be one of {', '.join(EXTRACTORS)} to be timed"
        )
    shape = (config.evaluate.batch_size, side, side, 3)
    return time_features(name, shape, seed=seed, repeats=repeats)


def load(config: Config) -> tuple[Pipeline, str]:
    """Load or draw the models; return them and what their weights are."""
    settings = config.benchmark
    if settings.model:
        check(config.sample, settings.model)
        pipeline = from_pretrained(settings.model, compute=config.compute)
        return cast(Pipeline, pipeline), settings.model  # `check` has seen that it draws images
    if not find_kind(config.task, "config.task").draws_images:
        raise ValueError(
            f"config.task={config.task!r} draws no images; use a config of a model that does, such "
            "as configs/imagenet_dar.py:l"
        )
    logging.info("Drawing random weights")
    return cast(Pipeline, random_pipeline(config, seed=SEED)), "random"


def measure(
    pipeline: Pipeline,
    settings: BenchmarkConfig,
    sampling: Any,
    speeds: tuple[DeviceSpeed, DeviceSpeed],
) -> Iterator[Row]:
    """Yield the measurements of every batch size that fits, and say how long the rest takes.

    Args:
        pipeline: the models.
        settings: what is timed.
        sampling: how images are drawn, but for the guidance scale.
        speeds: of the device, in the dtype that draws and in the one that decodes.
    """
    microbatch, scales = settings.microbatch or None, settings.guidance_scales
    runs_class = runs_of(pipeline)
    runs_of_size = {
        size: runs_class(pipeline, sampling, *speeds, size, microbatch, settings.repeats)
        for size in settings.batch_sizes
    }
    left = {
        size: sum(sum(runs.bounds(scale).values()) for scale in (*scales, None))
        for size, runs in runs_of_size.items()
    }
    start, done = time.monotonic(), 0.0
    for batch_size, runs in runs_of_size.items():
        try:
            check_memory(runs.cache_bytes(max(scales)))
            for row in runs.rows(scales):
                yield row
                left[batch_size] -= row.bound_seconds
                done += row.bound_seconds
                remaining = (time.monotonic() - start) * sum(left.values()) / done
                logging.info("%s; about %.0f s left", " | ".join(row.cells()), remaining)
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if not (isinstance(error, MemoryError) or OUT_OF_MEMORY in str(error)):
                raise
            reason = str(error).splitlines()[0]
            logging.info("Batch size %d skipped, it does not fit: %s", batch_size, reason)
            left[batch_size] = 0.0


def runs_of(pipeline: Pipeline) -> type[Runs]:
    """What is timed of a pipeline."""
    return next(
        kind.runs for kind in KINDS.values() if kind.runs and kind.pipeline is type(pipeline)
    )


def check_memory(needed: int) -> None:
    """Raise MemoryError if caches of so many bytes are more than there is."""
    present = memory_bytes()
    if needed > present:
        raise MemoryError(f"caches of {needed / GIGA:.1f} GB, memory of {present / GIGA:.1f} GB")


def describe(context: dict[str, Any]) -> str:
    """One line on where and how the figures came about."""
    names = (*SIZES, "decode_weights", "decode_cache")
    size = ", ".join(f"{name} {context[name]}" for name in names if name in context)
    return (
        f"{context['device']}, jax {context['jax']}, {context['dtype']}, decoding in "
        f"{context['decode_dtype']}, {context['weights']} weights; {size}; bounds from "
        f"{context['bandwidth'] / GIGA:.4g} GB/s (one matrix-vector product: "
        f"{context['product_bandwidth'] / GIGA:.4g}) and "
        f"{context['matmul_flops'] / GIGA:.4g} GFLOP/s (decoding: "
        f"{context['decode_matmul_flops'] / GIGA:.4g}), "
        f"measured in this run; medians of {context['repeats']}"
    )
