"""What `--mode=benchmark` times of D-AR, and the work of it."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dar_jax.common.flops import flops
from dar_jax.common.tree import tree_bytes
from dar_jax.common.typing import Array, Params
from dar_jax.models.dar import sampler
from dar_jax.models.dar.decoding import READ_PER_TOKEN
from dar_jax.models.dar.llama import Llama
from dar_jax.models.dar.options import DarSampling
from dar_jax.models.dar.tokenizer import Tokenizer
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.performance.runs import SEED, Part, Runs, Work
from dar_jax.pipelines.dar import DarPipeline
from dar_jax.sampling import autoregressive


class DarRuns(Runs):
    """What is timed: labels to tokens, and tokens to images."""

    pipeline: DarPipeline
    sampling: DarSampling

    def num_rows(self, scale: float) -> int:
        is_distilled = self.pipeline.prior.config.max_guidance
        return self.batch_size if is_distilled else super().num_rows(scale)

    def parts(self, scale: float | None) -> tuple[Part]:
        return (self.flow() if scale is None else self.tokens(scale),)

    def tokens(self, scale: float) -> Part:
        """Labels to tokens."""
        num_tokens = self.pipeline.prior.config.num_tokens
        return Part(
            "tokens",
            lambda: self.pipeline.prior.generate_indices(
                self.labels, rng=jax.random.key(SEED), sampling=self.guided(scale)
            ),
            [self.tokens_work(scale, self.boundaries)],
            lambda seconds: {
                "ms_per_token": 1e3 * seconds / num_tokens,
                "tokens_per_second": self.batch_size * num_tokens / seconds,
            },
        )

    def flow(self) -> Part:
        """Tokens to images."""
        tokenizer, num_steps = self.pipeline.tokenizer, self.num_steps
        return Part(
            "flow",
            lambda: tokenizer.decode(
                self.indices,
                rng=jax.random.key(SEED),
                solver=self.sampling.solver,
                num_steps=num_steps,
                microbatch=self.microbatch,
            ),
            [self.flow_work(tokenizer.config.num_tokens, num_steps)],
            lambda seconds: {"seconds_per_step": seconds / num_steps},
        )

    def first_preview(self, scale: float) -> tuple[Work, Work]:
        """Groups that complete the window of a step, and the steps whose windows they complete."""
        config, ends = self.pipeline.tokenizer.config, self.boundaries
        num_groups = 1 + next(i for i, end in enumerate(ends) if end >= config.window)
        steps = sampler.steps_of_groups(config, self.num_steps, num_groups)
        return (
            self.tokens_work(scale, ends[:num_groups]),
            self.flow_work(ends[num_groups - 1], steps),
        )

    def cache_bytes(self, scale: float) -> int:
        """Twice the keys and values, while they grow."""
        model = self.pipeline.prior.model
        num_slots = model.config.condition_tokens + model.config.num_tokens
        return 2 * self.num_rows(scale) * num_slots * autoregressive.slot_bytes(model)

    def tokens_work(self, scale: float, boundaries: Sequence[int]) -> Work:
        """Work of the first tokens; each reads the weights, and the slots of its group's caches.

        Args:
            scale: guidance scale.
            boundaries: numbers of tokens after each group.
        """
        prior, num_rows = self.pipeline.prior, self.num_rows(scale)
        weights = tree_bytes([prior.sampling_params[name] for name in READ_PER_TOKEN])
        num_bytes = start = 0
        for stop in boundaries:
            num_slots = prior.config.condition_tokens + stop - 1
            caches = num_rows * num_slots * autoregressive.slot_bytes(prior.model)
            num_bytes += (stop - start) * (weights + caches)
            start = stop
        return Work(num_rows * _tokens_flops(prior.model, boundaries[-1]), num_bytes)

    def flow_work(self, num_tokens: int, stop_step: int) -> Work:
        """Work of the first steps, from the first tokens."""
        model = self.pipeline.tokenizer.model
        num_flops = self.batch_size * _flow_flops(model, num_tokens, self.num_steps, stop_step)
        return Work(num_flops, decodes=True)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Number of tokens after each group."""
        return sampler.group_boundaries(self.pipeline.tokenizer.config)

    @property
    def num_steps(self) -> int:
        return self.sampling.steps(self.pipeline.tokenizer.config)

    @functools.cached_property
    def indices(self) -> Array:
        """Random tokens [B, N]."""
        config = self.pipeline.tokenizer.config
        shape = (self.batch_size, config.num_tokens)
        return jax.random.randint(jax.random.key(SEED), shape, 0, config.codebook_size)


@functools.cache
def _tokens_flops(model: FunctionalModel[Llama], num_tokens: int) -> float:
    """FLOPs to draw the first tokens of one row: those of one teacher-forced pass."""
    config = model.config

    def logits(params: Params, condition: Array, indices: Array) -> Array:
        module = model.bind(params)
        return module.head(module.hidden(condition, indices)[:, config.condition_tokens - 1 :])

    condition = jax.ShapeDtypeStruct((1,), jnp.int32)
    if config.caption_dim is not None:
        shape = (1, config.condition_tokens, config.caption_dim)
        condition = jax.ShapeDtypeStruct(shape, jnp.float32)
    indices = jax.ShapeDtypeStruct((1, num_tokens - 1), jnp.int32)
    return flops(logits, model.abstract_params(), condition, indices)


@functools.cache
def _flow_flops(
    model: FunctionalModel[Tokenizer], num_tokens: int, num_steps: int, stop_step: int
) -> float:
    """FLOPs of the first of `num_steps` steps of one image; all solvers take the same."""
    return flops(
        sampler.decode_indices,
        model,
        model.abstract_params(),
        jax.ShapeDtypeStruct((1, num_tokens), jnp.int32),
        jax.ShapeDtypeStruct((1, *(model.config.image_size,) * 2, 3), jnp.float32),
        num_steps=num_steps,
        stop_step=stop_step,
    )
