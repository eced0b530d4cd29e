"""`--mode=benchmark`: speed of sampling on one device, each figure beside its bound.

The bound is what the device could do at best, see `sampling_bounds`; its memory bandwidth and
matrix FLOP/s are measured in the same run. Everything is compiled and run once before it is timed;
a figure is the median of the repeats.
"""

import dataclasses
import functools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging

from dar_jax import device_speed
from dar_jax.common import files, model_dir
from dar_jax.common.checks import check_microbatch
from dar_jax.common.config import build
from dar_jax.device_speed import DeviceSpeed, timed
from dar_jax.models.dar import sampler, work
from dar_jax.models.dar.llama import Llama, LlamaConfig
from dar_jax.models.dar.tokenizer import Tokenizer, TokenizerConfig
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional import FunctionalModel
from dar_jax.pipelines import DarPipeline, PriorPipeline, TokenizerPipeline, from_pretrained
from dar_jax.sampling_bounds import SamplingBounds

COLUMNS = ("phase", "batch", "guidance", "seconds", "images/s", "bound images/s", "of bound", "")
SEED = 0
GIGA = 1e9
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """What is timed.

    Attributes:
        model: model directory of a prior; empty takes random weights of the size of
            `config.model`, which are as fast.
        batch_sizes: images at a time; those that do not fit into memory are skipped.
        guidance_scales: of the tokens; 1 is no guidance and half the work.
        microbatch: images that the flow decoder sees at a time in larger batches; 0 is all.
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


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        phase: "tokens", "flow", "end to end", "first preview" or "streaming".
        batch_size: images at a time.
        guidance_scale: of the tokens; None where there are none.
        seconds: median time of a batch.
        bound_seconds: least time of a batch.
        details: further figures by name.
    """

    phase: str
    batch_size: int
    guidance_scale: float | None
    seconds: float
    bound_seconds: float
    details: dict[str, float]

    @property
    def fraction_of_bound(self) -> float:
        return self.bound_seconds / self.seconds

    def as_json(self) -> dict[str, Any]:
        """Flat names and values."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        details = fields.pop("details")
        return {
            **fields,
            "images_per_second": self.batch_size / self.seconds,
            "bound_images_per_second": self.batch_size / self.bound_seconds,
            "fraction_of_bound": self.fraction_of_bound,
            **details,
        }

    def cells(self) -> tuple[str, ...]:
        """Values under `COLUMNS`."""
        return (
            self.phase,
            str(self.batch_size),
            "-" if self.guidance_scale is None else f"{self.guidance_scale:g}",
            f"{self.seconds:.4g}",
            f"{self.batch_size / self.seconds:.4g}",
            f"{self.batch_size / self.bound_seconds:.4g}",
            f"{100 * self.fraction_of_bound:.1f} %",
            ", ".join(f"{name} {value:.4g}" for name, value in self.details.items()),
        )


def benchmark(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Print a table and write `WORKDIR/benchmark.jsonl`, a line per measurement.

    Raises:
        ValueError: the model cannot be read, or the config names no prior.
    """
    settings = build(BenchmarkConfig, config.benchmark.to_dict(), "config.benchmark")
    compute = build(Compute, config.compute.to_dict(), "config.compute")
    pipeline, weights = load(settings, config, compute)
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
        "num_layers": pipeline.prior.config.num_layers,
        "dim": pipeline.prior.config.dim,
        "repeats": settings.repeats,
        "bandwidth": speed.bandwidth,
        "product_bandwidth": speed.product_bandwidth,
        "matmul_flops": speed.flops,
    }
    rows = []
    for row in measure(pipeline, settings, speed):
        rows.append(row)
        with files.replacing(path) as temporary:
            lines = (json.dumps({**row.as_json(), **context}) for row in rows)
            temporary.write_text("".join(f"{line}\n" for line in lines))
    if not rows:
        raise ValueError(f"config.benchmark.batch_sizes={settings.batch_sizes}: none fits")
    logging.info("Wrote %s\n%s\n%s", path, describe(context), table(rows))


def load(
    settings: BenchmarkConfig, config: ml_collections.ConfigDict, compute: Compute
) -> tuple[DarPipeline, str]:
    """Load or draw the models; return them and what their weights are."""
    if settings.model:
        pipeline = from_pretrained(settings.model, compute=compute)
        if not isinstance(pipeline, DarPipeline):
            raise ValueError(
                f"{settings.model} holds a tokenizer; the benchmark needs a prior's model directory"
            )
        return pipeline, settings.model
    if config.task != "dar_prior":
        raise ValueError(
            f"config.task={config.task!r} has no prior to sample from; use "
            "--config=configs/imagenet_dar.py:l or another config of a dar_prior"
        )
    prior_config = build(LlamaConfig, config.model.to_dict(), "config.model")
    tokenizer_config, source = _tokenizer_config(config.tokenizer)
    sampler.check_pair(prior_config, tokenizer_config, source)
    logging.info("Drawing random weights; tokenizer: %s", source)
    prior = FunctionalModel(Llama, prior_config, compute)
    tokenizer = FunctionalModel(Tokenizer, tokenizer_config, compute)
    rng = jax.random.key(SEED)
    return DarPipeline(
        PriorPipeline(prior, jax.jit(prior.init)(rng)),
        TokenizerPipeline(tokenizer, jax.jit(tokenizer.init)(rng)),
    ), "random"


def _tokenizer_config(directory: str) -> tuple[TokenizerConfig, str]:
    """Return the tokenizer's architecture and where it is from."""
    if not (model_dir.locate(directory) / model_dir.CONFIG_NAME).is_file():
        return TokenizerConfig(), f"the default architecture (v1), for want of {directory}"
    loaded = model_dir.load_config(model_dir.locate(directory), "dar_tokenizer")
    return build(TokenizerConfig, loaded["model"], directory), f"the architecture of {directory}"


def measure(pipeline: DarPipeline, settings: BenchmarkConfig, speed: DeviceSpeed) -> Iterator[Row]:
    """Yield the measurements of every batch size that fits, and say how long the rest takes."""
    itemsize = pipeline.prior.model.compute.jnp_dtype.itemsize
    bounds = SamplingBounds(pipeline.prior.config, pipeline.tokenizer.config, itemsize, speed)
    scales = settings.guidance_scales
    left = {size: bounds.of_all_rows(size, scales) for size in settings.batch_sizes}
    start, done = time.monotonic(), 0.0
    for batch_size in settings.batch_sizes:
        runs = Runs(pipeline, bounds, settings, batch_size)
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


def check_memory(bounds: SamplingBounds, batch_size: int, *, guided: bool) -> None:
    """Raise MemoryError if the caches alone, twice while they grow, are more than there is."""
    rows = batch_size * (1 + guided)
    needed = 2 * rows * work.kv_cache_bytes(bounds.prior, itemsize=bounds.itemsize)
    present = memory_bytes()
    if needed > present:
        raise MemoryError(f"caches of {needed / GIGA:.1f} GB, memory of {present / GIGA:.1f} GB")


def memory_bytes() -> int:
    """Memory of the default device; that of the machine where it does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclasses.dataclass(frozen=True)
class Runs:
    """Timed runs at one batch size."""

    pipeline: DarPipeline
    bounds: SamplingBounds
    settings: BenchmarkConfig
    batch_size: int

    @property
    def microbatch(self) -> int | None:
        return self.settings.microbatch or None

    @property
    def labels(self) -> np.ndarray:
        return np.arange(self.batch_size, dtype=np.int32) % self.bounds.prior.num_classes

    def rows(self, scales: Sequence[float]) -> Iterator[Row]:
        """Yield all measurements."""
        for scale in scales:
            yield self.tokens(scale)
            yield from self.images(scale)
        yield self.flow()

    def tokens(self, scale: float) -> Row:
        """Labels to tokens."""
        prior, rng = self.pipeline.prior, jax.random.key(SEED)
        num_tokens = prior.config.num_tokens
        generate = functools.partial(prior.generate_indices, rng=rng, guidance_scale=scale)
        seconds = self._median(lambda: generate(self.labels))
        bound = self.bounds.tokens(self.batch_size, scale > 1)
        details = {
            "ms_per_token": 1e3 * seconds / num_tokens,
            "tokens_per_second": self.batch_size * num_tokens / seconds,
        }
        return Row("tokens", self.batch_size, scale, seconds, bound, details)

    def flow(self) -> Row:
        """Tokens to images."""
        tokenizer = self.pipeline.tokenizer
        shape = (self.batch_size, tokenizer.config.num_tokens)
        rng = jax.random.key(SEED)
        indices = jax.random.randint(rng, shape, 0, tokenizer.config.codebook_size)
        seconds = self._median(
            lambda: tokenizer.decode(indices, rng=rng, microbatch=self.microbatch)
        )
        details = {"seconds_per_step": seconds / tokenizer.config.num_steps}
        bound = self.bounds.flow(self.batch_size)
        return Row("flow", self.batch_size, None, seconds, bound, details)

    def images(self, scale: float) -> Iterator[Row]:
        """Labels to images: with the last one alone, and with all previews fetched."""
        rng = jax.random.key(SEED)
        options = dict(rng=rng, guidance_scale=scale, microbatch=self.microbatch)

        def generate() -> Any:
            return self.pipeline.generate(self.labels, **options)

        def stream() -> tuple[float, float]:
            """Seconds to the first preview and to the last."""
            start, times = time.perf_counter(), []
            for preview in self.pipeline.stream(self.labels, **options):
                np.asarray(preview.images)
                times.append(time.perf_counter() - start)
            return times[0], times[-1]

        guided, size = scale > 1, self.batch_size
        seconds = self._median(generate)
        bound = self.bounds.end_to_end(size, guided)
        yield Row("end to end", size, scale, seconds, bound, {})
        times = np.median([stream() for _ in range(self.settings.repeats)], axis=0)
        first, last = map(float, times)
        first_bound = self.bounds.first_preview(size, guided)
        yield Row("first preview", size, scale, first, first_bound, {"ms": 1e3 * first})
        details = {"without_previews": seconds, "overhead": last / seconds - 1}
        yield Row("streaming", size, scale, last, bound, details)

    def _median(self, run: Callable[[], Any]) -> float:
        """Compile, then take the median of the repeats."""
        timed(run)
        return statistics.median(timed(run)[1] for _ in range(self.settings.repeats))


def describe(context: dict[str, Any]) -> str:
    """One line on where and how the figures came about."""
    return (
        f"{context['device']}, jax {context['jax']}, {context['dtype']}, {context['weights']} "
        f"weights; {context['num_layers']} layers of width {context['dim']}; bounds from "
        f"{context['bandwidth'] / GIGA:.4g} GB/s (one matrix-vector product: "
        f"{context['product_bandwidth'] / GIGA:.4g}) and "
        f"{context['matmul_flops'] / GIGA:.4g} GFLOP/s, "
        f"measured in this run; medians of {context['repeats']}"
    )


def table(rows: Sequence[Row]) -> str:
    """Lay the rows out under their column names."""
    cells = [COLUMNS, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )
