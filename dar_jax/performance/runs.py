"""Timed runs of `--mode=benchmark` at one batch size; every call is the one that sampling makes.

Both families: labels to images, with the last ones alone ("end to end") and with all previews
fetched ("first preview", "streaming"). D-AR's parts are the tokens and the flow decoder, those of
TransDiff the encoder, the steps with keys and values at hand, and the autoencoder.
"""

import abc
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.models.dar.options import DarSampling
from dar_jax.models.transdiff import sampler
from dar_jax.models.transdiff.options import TransDiffSampling
from dar_jax.performance.bounds import Bounds, DarBounds, TransDiffBounds
from dar_jax.performance.device_speed import DeviceSpeed, timed
from dar_jax.performance.rows import Row
from dar_jax.pipelines.base import Pipeline, image_keys
from dar_jax.pipelines.dar import DarPipeline
from dar_jax.pipelines.transdiff import TransDiffPipeline

SEED = 0


class Part(NamedTuple):
    """A part of sampling.

    Attributes:
        phase: its name in the bounds.
        run: does it once.
        details: further figures by name, from its seconds.
    """

    phase: str
    run: Callable[[], Any]
    details: Callable[[float], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Runs(abc.ABC):
    """Timed runs at one batch size.

    Attributes:
        pipeline: the models.
        bounds: of the models.
        sampling: how images are drawn, but for the guidance scale.
        batch_size: images at a time.
        microbatch: images that the second model sees at a time; None is all.
        repeats: timed runs of everything.
    """

    pipeline: Pipeline
    bounds: Bounds
    sampling: Any
    batch_size: int
    microbatch: int | None
    repeats: int

    @staticmethod
    @abc.abstractmethod
    def bounds_of(pipeline: Pipeline, sampling: Any, speed: DeviceSpeed) -> Bounds:
        """Return the bounds of the models on a device."""

    @abc.abstractmethod
    def parts(self, scale: float | None) -> Iterator[Part]:
        """Yield the parts that depend on a guidance scale; None: the one that does not."""

    @property
    def labels(self) -> np.ndarray:
        return np.arange(self.batch_size, dtype=np.int32) % max(self.pipeline.num_classes, 1)

    def rows(self, scales: Sequence[float]) -> Iterator[Row]:
        """Yield all measurements."""
        for scale in (*scales, None):
            bounds = self.bounds.phases(self.batch_size, scale)
            for part in self.parts(scale):
                seconds = self._median(part.run)
                details = part.details(seconds)
                yield Row(part.phase, self.batch_size, scale, seconds, bounds[part.phase], details)
            if scale is not None:
                yield from self.images(scale, bounds)

    def images(self, scale: float, bounds: dict[str, float]) -> Iterator[Row]:
        """Labels to images: with the last one alone, and with all previews fetched."""
        options = dict(
            sampling=self.guided(scale), microbatch=self.microbatch, rng=jax.random.key(SEED)
        )

        def stream() -> tuple[float, float]:
            """Seconds to the first preview and to the last."""
            start, times = time.perf_counter(), []
            for preview in self.pipeline.stream(self.labels, **options):
                np.asarray(preview.images)
                times.append(time.perf_counter() - start)
            return times[0], times[-1]

        def row(phase: str, seconds: float, **details: float) -> Row:
            return Row(phase, self.batch_size, scale, seconds, bounds[phase], details)

        seconds = self._median(lambda: self.pipeline.generate(self.labels, **options))
        yield row("end to end", seconds)
        stream()
        times = np.median([stream() for _ in range(self.repeats)], axis=0)
        first, last = map(float, times)
        yield row("first preview", first, ms=1e3 * first)
        yield row("streaming", last, without_previews=seconds, overhead=last / seconds - 1)

    def guided(self, scale: float) -> Any:
        """How images are drawn, with a guidance scale."""
        return dataclasses.replace(self.sampling, guidance_scale=(scale,))

    def _median(self, run: Callable[[], Any]) -> float:
        """Compile, then take the median of the repeats."""
        timed(run)
        return statistics.median(timed(run)[1] for _ in range(self.repeats))


class DarRuns(Runs):
    """Timed runs of D-AR."""

    @staticmethod
    def bounds_of(pipeline: DarPipeline, sampling: DarSampling, speed: DeviceSpeed) -> DarBounds:
        itemsize = pipeline.compute.jnp_dtype.itemsize
        return DarBounds(pipeline.prior.config, pipeline.tokenizer.config, itemsize, speed)

    def parts(self, scale: float | None) -> Iterator[Part]:
        yield self.flow() if scale is None else self.tokens(scale)

    def tokens(self, scale: float) -> Part:
        """Labels to tokens."""
        num_tokens = self.pipeline.prior.config.num_tokens
        run = functools.partial(
            self.pipeline.prior.generate_indices,
            self.labels,
            rng=jax.random.key(SEED),
            sampling=self.guided(scale),
        )
        return Part(
            "tokens",
            run,
            lambda seconds: {
                "ms_per_token": 1e3 * seconds / num_tokens,
                "tokens_per_second": self.batch_size * num_tokens / seconds,
            },
        )

    def flow(self) -> Part:
        """Tokens to images."""
        tokenizer, rng = self.pipeline.tokenizer, jax.random.key(SEED)
        shape = (self.batch_size, tokenizer.config.num_tokens)
        indices = jax.random.randint(rng, shape, 0, tokenizer.config.codebook_size)
        num_steps = self.sampling.steps(tokenizer.config)
        run = functools.partial(
            tokenizer.decode,
            indices,
            rng=rng,
            solver=self.sampling.solver,
            num_steps=num_steps,
            microbatch=self.microbatch,
        )
        return Part("flow", run, lambda seconds: {"seconds_per_step": seconds / num_steps})


class TransDiffRuns(Runs):
    """Timed runs of TransDiff."""

    @staticmethod
    def bounds_of(
        pipeline: TransDiffPipeline, sampling: TransDiffSampling, speed: DeviceSpeed
    ) -> TransDiffBounds:
        model, vae = pipeline.prior.config, pipeline.vae.config
        itemsize = pipeline.compute.jnp_dtype.itemsize
        return TransDiffBounds(model, vae, sampling.num_steps, itemsize, speed)

    def parts(self, scale: float | None) -> Iterator[Part]:
        config = self.pipeline.prior.config
        rngs = image_keys(jax.random.key(SEED), self.batch_size)
        noise = sampler.initial_noise(rngs, config)
        if scale is None:
            yield self.decode(noise)
            return
        passes, solver = config.num_references, self.guided(scale)
        encode = functools.partial(self._conditions, noise, scale)
        yield Part("encoder", encode, lambda seconds: {"ms_per_pass": 1e3 * seconds / passes})

        caches = encode()
        denoise = functools.partial(self._denoise, caches, noise, rngs, solver)
        steps = passes * solver.num_steps
        yield Part("denoising", denoise, lambda seconds: {"ms_per_step": 1e3 * seconds / steps})

    def decode(self, latents: jax.Array) -> Part:
        """Latents to images."""
        vae = self.pipeline.vae
        run = functools.partial(
            sampler.decode, vae.model, vae.params, latents, microbatch=self.microbatch
        )
        return Part("decode", run, lambda seconds: {})

    def _conditions(self, noise: jax.Array, scale: float) -> list[sampler.KVCache]:
        """Keys and values of every pass; references cost the same whatever they show."""
        prior = self.pipeline.prior
        references = jnp.stack([noise] * prior.config.num_references, axis=1)
        return [
            sampler.condition_caches(
                prior.model,
                prior.sampling_params,
                self.labels,
                references[:, :step_pass],
                guided=scale != 1,
            )
            for step_pass in range(prior.config.num_references)
        ]

    def _denoise(
        self,
        caches: list[sampler.KVCache],
        noise: jax.Array,
        rngs: jax.Array,
        solver: TransDiffSampling,
    ) -> list[sampler.LatentPreview]:
        """All steps of all passes."""
        prior = self.pipeline.prior
        model, params = prior.model, prior.sampling_params
        return [
            progress
            for step_pass, cache in enumerate(caches)
            for progress in sampler.denoise(
                model, params, cache, noise, rngs, solver, step_pass=step_pass
            )
        ]
