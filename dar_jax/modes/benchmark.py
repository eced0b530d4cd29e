"""`--mode=benchmark`: speed of sampling on one device, each figure beside its bound.

The bound is what the device could do at best, see `performance.bounds`; its memory bandwidth and
matrix FLOP/s are measured in the same run. What is timed, of either family, is in
`performance.runs`; everything is compiled and run once before, and a figure is the median of the
repeats.
"""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
from absl import logging

from dar_jax.common import files
from dar_jax.common.checks import check_microbatch
from dar_jax.common.config_build import build
from dar_jax.common.typing import Params
from dar_jax.generation.batches import SampleConfig, check, drawing
from dar_jax.kinds.architectures import tokenizer_config, vae_config
from dar_jax.models.dar.llama import Llama, LlamaConfig
from dar_jax.models.dar.sampler import check_pair
from dar_jax.models.dar.tokenizer import Tokenizer
from dar_jax.models.kl_vae import KlVae
from dar_jax.models.transdiff.model import TransDiff, TransDiffConfig
from dar_jax.models.transdiff.sampler import check_vae
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.performance import device_speed
from dar_jax.performance.bounds import Bounds
from dar_jax.performance.device_speed import DeviceSpeed
from dar_jax.performance.rows import Row, table
from dar_jax.performance.runs import RUNS, SEED
from dar_jax.pipelines import (
    DarPipeline,
    KlVaePipeline,
    LatentPipeline,
    PriorPipeline,
    TokenizerPipeline,
    TransDiffPipeline,
    from_pretrained,
)

GIGA = 1e9
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
SIZES = (
    *("dim", "num_layers", "encoder_depth", "decoder_depth", "latent_size", "num_references"),
    "num_steps",
)
"""What tells an architecture, and a way of sampling, from others of its family."""


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """What is timed.

    Attributes:
        model: model directory of a model that draws images; empty takes random weights of the size
            of `config.model`, which are as fast.
        batch_sizes: images at a time; those that do not fit into memory are skipped.
        guidance_scales: 1 is no guidance and half the work. All else that there is to choose in
            drawing is as in `config.sample`.
        microbatch: images that the flow decoder (D-AR) or the autoencoder (TransDiff) sees at a
            time in larger batches; 0 is all.
        repeats: timed runs of everything.
    """

    model: str = ""
    batch_sizes: tuple[int, ...] = (1, 8, 64, 256)
    guidance_scales: tuple[float, ...] = (4.0, 1.0)
    microbatch: int = 0
    repeats: int = 3

    def __post_init__(self):
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes={self.batch_sizes} must be one or more sizes from 1 on")
        if not self.guidance_scales or min(self.guidance_scales) < 1:
            raise ValueError(
                f"guidance_scales={self.guidance_scales} must be one or more scales of at least 1"
            )
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats} must be at least 1")
        for batch_size in self.batch_sizes:
            check_microbatch(self.microbatch or None, batch_size)


def benchmark(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Print a table and write `WORKDIR/benchmark.jsonl`, a line per measurement.

    Raises:
        ValueError: the model cannot be read or draws no images, or a block of the config is wrong.
    """
    settings = build(BenchmarkConfig, config.benchmark.to_dict(), "config.benchmark")
    sampling = build(SampleConfig, config.sample.to_dict(), "config.sample")
    compute = build(Compute, config.compute.to_dict(), "config.compute")
    if settings.model:
        check(sampling, settings.model)
    pipeline, weights = load(settings, config, compute)
    options = drawing(sampling, pipeline)
    del options["guidance_scale"]  # those of the benchmark
    for scale in settings.guidance_scales:
        pipeline.check_options(pipeline.prior.config, **options, guidance_scale=scale)
    path = pathlib.Path(workdir) / "benchmark.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)

    device = jax.devices()[0]
    logging.info("Measuring the speed of %s in %s", device.device_kind, compute.dtype)
    speed = device_speed.measure(compute.jnp_dtype)
    context = {
        "device": device.device_kind,
        "platform": device.platform,
        "cpu_count": os.cpu_count(),
        "jax": jax.__version__,
        "dtype": compute.dtype,
        "weights": weights,
        **options,
        **{name: value for name, value in vars(pipeline.prior.config).items() if name in SIZES},
        "repeats": settings.repeats,
        "bandwidth": speed.bandwidth,
        "product_bandwidth": speed.product_bandwidth,
        "matmul_flops": speed.flops,
    }
    rows = []
    for row in measure(pipeline, settings, options, speed):
        rows.append(row)
        with files.replacing(path) as temporary:
            lines = (json.dumps({**row.as_json(), **context}) for row in rows)
            temporary.write_text("".join(f"{line}\n" for line in lines))
    if not rows:
        raise ValueError(f"config.benchmark.batch_sizes={settings.batch_sizes}: none fits")
    logging.info("Wrote %s\n%s\n%s", path, describe(context), table(rows))


def load(
    settings: BenchmarkConfig, config: ml_collections.ConfigDict, compute: Compute
) -> tuple[DarPipeline | TransDiffPipeline, str]:
    """Load or draw the models; return them and what their weights are."""
    if settings.model:
        return from_pretrained(settings.model, compute=compute), settings.model
    logging.info("Drawing random weights")
    match config.task:
        case "dar_prior":
            model = build(LlamaConfig, config.model.to_dict(), "config.model")
            tokenizer = tokenizer_config(config.tokenizer)
            check_pair(model, tokenizer, config.tokenizer)
            return DarPipeline(
                PriorPipeline(*_draw(Llama, model, compute)),
                TokenizerPipeline(*_draw(Tokenizer, tokenizer, compute)),
            ), "random"
        case "transdiff":
            model = build(TransDiffConfig, config.model.to_dict(), "config.model")
            vae = vae_config(config.vae)
            check_vae(model, vae, config.vae)
            return TransDiffPipeline(
                LatentPipeline(*_draw(TransDiff, model, compute)),
                KlVaePipeline(*_draw(KlVae, vae, compute)),
            ), "random"
        case _:
            raise ValueError(
                f"config.task={config.task!r} draws no images; use a config of a dar_prior or "
                "transdiff, such as configs/imagenet_dar.py:l"
            )


def _draw(cls: type, config: Any, compute: Compute) -> tuple[FunctionalModel, Params]:
    model = FunctionalModel(cls, config, compute)
    return model, jax.jit(model.init)(jax.random.key(SEED))


def measure(
    pipeline: DarPipeline | TransDiffPipeline,
    settings: BenchmarkConfig,
    options: dict[str, Any],
    speed: DeviceSpeed,
) -> Iterator[Row]:
    """Yield the measurements of every batch size that fits, and say how long the rest takes.

    Args:
        pipeline: the models.
        settings: what is timed.
        options: of drawing, all but the guidance scale.
        speed: of the device.
    """
    family = RUNS[type(pipeline)]
    bounds = family.bounds_of(pipeline, options, speed)
    scales = settings.guidance_scales
    left = {
        size: sum(sum(bounds.phases(size, scale).values()) for scale in (*scales, None))
        for size in settings.batch_sizes
    }
    start, done = time.monotonic(), 0.0
    for batch_size in settings.batch_sizes:
        microbatch = settings.microbatch or None
        runs = family(pipeline, bounds, options, batch_size, microbatch, settings.repeats)
        try:
            check_memory(bounds, batch_size, guided=max(scales) > 1)
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


def check_memory(bounds: Bounds, batch_size: int, *, guided: bool) -> None:
    """Raise MemoryError if the caches alone are more than there is."""
    needed, present = bounds.memory_bytes(batch_size, guided), memory_bytes()
    if needed > present:
        raise MemoryError(f"caches of {needed / GIGA:.1f} GB, memory of {present / GIGA:.1f} GB")


def memory_bytes() -> int:
    """Memory of the default device; that of the machine where it does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def describe(context: dict[str, Any]) -> str:
    """One line on where and how the figures came about."""
    size = ", ".join(f"{name} {context[name]}" for name in SIZES if name in context)
    return (
        f"{context['device']}, jax {context['jax']}, {context['dtype']}, {context['weights']} "
        f"weights; {size}; bounds from "
        f"{context['bandwidth'] / GIGA:.4g} GB/s (one matrix-vector product: "
        f"{context['product_bandwidth'] / GIGA:.4g}) and "
        f"{context['matmul_flops'] / GIGA:.4g} GFLOP/s, "
        f"measured in this run; medians of {context['repeats']}"
    )
