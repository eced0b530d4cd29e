"""Timed runs of `--mode=benchmark` at one batch size, beside the least time that each can take.

What is timed is the call that sampling makes: the parts of a kind of model, which stand in its
entry of `kinds`, and labels to images, with the last ones alone ("end to end") and with all
previews fetched ("first preview", "streaming"). The bounds follow from the speed of the device and
from the work of the parts, whose FLOPs are traced and whose bytes are those of shapes:

    a work           max(weights and caches read / bandwidth, FLOPs / FLOP/s)
    a part           all its works, one after the other
    end to end       all parts, one after the other
    first preview    of all parts what it needs
    streaming        end to end + what the other previews need beyond it

D-AR:
    tokens           each token reads weights and caches; look-ahead may be faster
    flow             FLOPs alone
    first preview    tokens of its groups + flow of its steps
    streaming        nothing beyond end to end: every step has its preview

TransDiff:
    encoder          the condition of every pass, its keys and values included; each reads the
                     weights once
    denoising        the steps of every pass; each step reads weights, keys and values
    decode           FLOPs alone
    first preview    the first condition + its steps + decode
    streaming        end to end + decode of every other preview
"""

import abc
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dar_jax.performance.device_speed import DeviceSpeed, timed
from dar_jax.performance.rows import Row
from dar_jax.pipelines.base import Pipeline

SEED = 0


class Work(NamedTuple):
    """What is to be done: FLOPs, and bytes of weights and caches that are read.

    `decodes` says that the tokenizer or autoencoder does it, in a dtype of its own.
    """

    flops: float
    num_bytes: int = 0
    decodes: bool = False


class Part(NamedTuple):
    """A part of sampling.

    Attributes:
        phase: its name.
        run: does it once.
        works: of one run, in what runs one after the other.
        details: further figures by name, from its seconds.
    """

    phase: str
    run: Callable[[], Any]
    works: Sequence[Work]
    details: Callable[[float], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Runs(abc.ABC):
    """Timed runs at one batch size.

    Attributes:
        pipeline: the models.
        sampling: how images are drawn, but for the guidance scale.
        speed: of the device, in the dtype of the model that draws.
        decode_speed: the same in that of the other one.
        batch_size: images at a time.
        microbatch: images that the second model sees at a time; None is all.
        repeats: timed runs of everything.
    """

    pipeline: Any
    sampling: Any
    speed: DeviceSpeed
    decode_speed: DeviceSpeed
    batch_size: int
    microbatch: int | None
    repeats: int

    @abc.abstractmethod
    def parts(self, scale: float | None) -> Sequence[Part]:
        """Return the parts that depend on a guidance scale, or, for None, those that do not.

        Nothing is computed before a part runs.
        """

    @abc.abstractmethod
    def first_preview(self, scale: float) -> Sequence[Work]:
        """Return the work up to the first preview, in what runs one after the other."""

    def other_previews(self) -> Sequence[Work]:
        """Return the work that all previews need beyond that of the image."""
        return ()

    @abc.abstractmethod
    def cache_bytes(self, scale: float) -> int:
        """Memory that the caches take at most."""

    @property
    def labels(self) -> np.ndarray:
        return np.arange(self.batch_size, dtype=np.int32) % max(self.pipeline.num_classes, 1)

    def num_rows(self, scale: float) -> int:
        """Rows of the batch: with guidance an image has two."""
        return self.batch_size * (1 + (scale > 1))

    def guided(self, scale: float) -> Any:
        """How images are drawn, with a guidance scale."""
        return dataclasses.replace(self.sampling, guidance_scale=(scale,))

    def seconds(self, works: Sequence[Work]) -> float:
        """Least time to do the works one after the other."""
        speeds = {False: self.speed, True: self.decode_speed}
        times = (speeds[work.decodes].seconds(work.num_bytes, work.flops) for work in works)
        return sum(times, start=0.0)

    def bounds(self, scale: float | None) -> dict[str, float]:
        """Least seconds of every phase by name, at a guidance scale; None: of those without."""
        parts = {part.phase: self.seconds(part.works) for part in self.parts(scale)}
        if scale is None:
            return parts
        image = sum(parts.values()) + sum(self.bounds(None).values())
        return {
            **parts,
            "end to end": image,
            "first preview": self.seconds(self.first_preview(scale)),
            "streaming": image + self.seconds(self.other_previews()),
        }

    def rows(self, scales: Sequence[float]) -> Iterator[Row]:
        """Yield all measurements."""
        for scale in (*scales, None):
            bounds = self.bounds(scale)
            for part in self.parts(scale):
                seconds = self._median(part.run)
                details = part.details(seconds)
                yield Row(part.phase, self.batch_size, scale, seconds, bounds[part.phase], details)
            if scale is not None:
                yield from self.images(scale, bounds)

    def images(self, scale: float, bounds: dict[str, float]) -> Iterator[Row]:
        """Labels to images: with the last one alone, and with all previews fetched."""
        pipeline: Pipeline = self.pipeline
        options = dict(
            sampling=self.guided(scale), microbatch=self.microbatch, rng=jax.random.key(SEED)
        )

        def stream() -> tuple[float, float]:
            """Seconds to the first preview and to the last."""
            start, times = time.perf_counter(), []
            for preview in pipeline.stream(self.labels, **options):
                np.asarray(preview.images)
                times.append(time.perf_counter() - start)
            return times[0], times[-1]

        def row(phase: str, seconds: float, **details: float) -> Row:
            return Row(phase, self.batch_size, scale, seconds, bounds[phase], details)

        seconds = self._median(lambda: pipeline.generate(self.labels, **options))
        yield row("end to end", seconds)
        stream()
        times = np.median([stream() for _ in range(self.repeats)], axis=0)
        first, last = map(float, times)
        yield row("first preview", first, ms=1e3 * first)
        yield row("streaming", last, without_previews=seconds, overhead=last / seconds - 1)

    def _median(self, run: Callable[[], Any]) -> float:
        """Compile, then take the median of the repeats."""
        timed(run)
        return statistics.median(timed(run)[1] for _ in range(self.repeats))
