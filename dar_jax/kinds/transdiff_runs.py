"""What `--mode=benchmark` times of TransDiff, and the work of it."""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dar_jax.common.flops import flops
from dar_jax.common.keys import image_keys
from dar_jax.common.tree import flatten, tree_bytes
from dar_jax.common.typing import Array, Params, PRNGKeys
from dar_jax.flow import solvers
from dar_jax.models.kl_vae import KlVae
from dar_jax.models.transdiff import sampler
from dar_jax.models.transdiff.model import TransDiff, TransDiffConfig
from dar_jax.models.transdiff.options import TransDiffSampling
from dar_jax.nn.attention import KVCache
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.performance.runs import SEED, Part, Runs, Work
from dar_jax.pipelines.transdiff import TransDiffPipeline

CLASS_TABLE = "encoder/class_table"
KEYS_VALUES = re.compile("/condition_projection/|/cross_attention/[kv]/")


class TransDiffRuns(Runs):
    """What is timed: the encoder, the steps with keys and values at hand, the autoencoder."""

    pipeline: TransDiffPipeline
    sampling: TransDiffSampling

    def parts(self, scale: float | None) -> tuple[Part, ...]:
        if scale is None:
            return (Part("decode", self.decode, [self.decode_work], lambda seconds: {}),)
        num_steps = self.sampling.num_steps
        conditions = functools.partial(self.conditions, scale)
        made = functools.cache(conditions)  # by the run that compiles, which is not timed
        return (
            Part(
                "encoder",
                conditions,
                [self.encoder_work(scale, k) for k in self.passes],
                lambda seconds: {"ms_per_pass": 1e3 * seconds / len(self.passes)},
            ),
            Part(
                "denoising",
                lambda: self.denoise(made(), scale),
                [self.steps_work(scale, k, num_steps) for k in self.passes],
                lambda seconds: {"ms_per_step": 1e3 * seconds / (len(self.passes) * num_steps)},
            ),
        )

    def first_preview(self, scale: float) -> tuple[Work, ...]:
        steps = sampler.steps_per_preview(self.pipeline.prior.config, self.sampling.num_steps)
        return self.encoder_work(scale, 0), self.steps_work(scale, 0, steps), self.decode_work

    def other_previews(self) -> list[Work]:
        num_steps = self.sampling.num_steps
        steps = sampler.steps_per_preview(self.pipeline.prior.config, num_steps)
        return [self.decode_work] * (len(self.passes) * math.ceil(num_steps / steps) - 1)

    def cache_bytes(self, scale: float) -> int:
        """Keys and values of the condition of the last pass."""
        caches = _caches(self.pipeline.prior.model, self.passes[-1])
        return self.num_rows(scale) * tree_bytes(caches)

    def encoder_work(self, scale: float, num_references: int) -> Work:
        """Work of the condition after so many references, and of its keys and values."""
        prior, num_rows = self.pipeline.prior, self.num_rows(scale)
        num_bytes = read_bytes(prior.sampling_params, per_step=False)
        return Work(num_rows * _condition_flops(prior.model, num_references), num_bytes)

    def steps_work(self, scale: float, num_references: int, num_steps: int) -> Work:
        """Work of so many steps, given the keys and values after so many references."""
        prior, num_rows = self.pipeline.prior, self.num_rows(scale)
        num_bytes = read_bytes(prior.sampling_params, per_step=True)
        num_bytes += num_rows * tree_bytes(_caches(prior.model, num_references))
        num_flops = num_rows * _step_flops(prior.model, num_references)
        return Work(num_steps * num_flops, num_steps * num_bytes)

    @property
    def decode_work(self) -> Work:
        """Work from latents to images."""
        prior, vae = self.pipeline.prior, self.pipeline.vae
        num_flops = self.batch_size * _decode_flops(vae.model, prior.config.latent_size)
        return Work(num_flops, decodes=True)

    @property
    def passes(self) -> range:
        """Every pass, by the number of references before it."""
        return range(self.pipeline.prior.config.num_references)

    @functools.cached_property
    def rngs(self) -> PRNGKeys:
        return image_keys(jax.random.key(SEED), self.batch_size)

    @functools.cached_property
    def noise(self) -> Array:
        return sampler.initial_noise(self.rngs, self.pipeline.prior.config)

    def conditions(self, scale: float) -> list[KVCache]:
        """Keys and values of every pass; references cost the same whatever they show."""
        prior = self.pipeline.prior
        references = jnp.stack([self.noise] * len(self.passes), axis=1)
        return [
            sampler.condition_caches(
                prior.model,
                prior.sampling_params,
                self.labels,
                references[:, :step_pass],
                guided=scale != 1,
            )
            for step_pass in self.passes
        ]

    def denoise(self, caches: Sequence[KVCache], scale: float) -> list[Array]:
        """All steps of all passes."""
        prior, solver, start = self.pipeline.prior, self.guided(scale), solvers.start(self.noise)
        fixed, part = (prior.model, prior.sampling_params), (0, solver.num_steps)
        return [
            sampler.denoise(
                *fixed, cache, start, self.rngs, solver, step_pass=step_pass, part=part
            )[1]
            for step_pass, cache in enumerate(caches)
        ]

    def decode(self) -> Array:
        """Latents to images."""
        vae = self.pipeline.vae
        return sampler.decode(vae.model, vae.params, self.noise, microbatch=self.microbatch)


def read_bytes(params: Params, *, per_step: bool) -> int:
    """Bytes of the parameters that a step, or else a condition, reads whole.

    A condition needs those of the encoder, but for the table of classes, and the projections of the
    decoder that make its keys and values; a step needs the others of the decoder.
    """

    def is_per_step(name: str) -> bool:
        return name.startswith("decoder/") and not KEYS_VALUES.search(name)

    return tree_bytes(
        [
            leaf
            for name, leaf in flatten(params).items()
            if is_per_step(name) == per_step and name != CLASS_TABLE
        ]
    )


def _shapes_before(config: TransDiffConfig, num_references: int) -> tuple[Any, Any]:
    """One label, and the references before an image of it."""
    latent = (config.latent_size, config.latent_size, config.channels)
    references = jax.ShapeDtypeStruct((1, num_references, *latent), jnp.float32)
    return jax.ShapeDtypeStruct((1,), jnp.int32), references


@functools.cache
def _caches(model: FunctionalModel[TransDiff], num_references: int) -> KVCache:
    """Shapes of the keys and values of one condition."""
    encode = functools.partial(sampler.condition_caches, model, guided=False)
    shapes = _shapes_before(model.config, num_references)
    return jax.eval_shape(encode, model.abstract_params(), *shapes)


@functools.cache
def _condition_flops(model: FunctionalModel[TransDiff], num_references: int) -> float:
    """FLOPs of one condition and its keys and values."""
    shapes = _shapes_before(model.config, num_references)
    return flops(sampler.condition_caches, model, model.abstract_params(), *shapes, guided=False)


@functools.cache
def _step_flops(model: FunctionalModel[TransDiff], num_references: int) -> float:
    """FLOPs of one velocity, given the keys and values of its condition."""

    def velocity(params: Params, x: Array, t: Array, caches: KVCache) -> Array:
        return model.bind(params).decoder.velocity(x, t, caches)

    config = model.config
    latent = (config.latent_size, config.latent_size, config.channels)
    return flops(
        velocity,
        model.abstract_params(),
        jax.ShapeDtypeStruct((1, *latent), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.float32),
        _caches(model, num_references),
    )


@functools.cache
def _decode_flops(vae: FunctionalModel[KlVae], latent_size: int) -> float:
    """FLOPs from one latent to its image."""
    shape = (1, latent_size, latent_size, vae.config.latent_channels)
    latents = jax.ShapeDtypeStruct(shape, jnp.float32)
    return flops(sampler.decode, vae, vae.abstract_params(), latents)
