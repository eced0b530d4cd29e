"""The D-AR prior by itself: class labels or captions to tokens."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from dar_jax.common import model_dir
from dar_jax.common.checks import check_shape
from dar_jax.common.keys import image_keys
from dar_jax.common.typing import Any, Array, Float, Int, Params, PRNGKeyArray, Shaped
from dar_jax.models.dar import draws
from dar_jax.models.dar.decoding import decoding_params
from dar_jax.models.dar.draft import open_draft
from dar_jax.models.dar.llama import Llama, LlamaConfig
from dar_jax.models.dar.options import DarSampling
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.nn.int8 import check_finite
from dar_jax.parallel.sharding import fsdp_sharding
from dar_jax.pipelines.base import ModelPipeline, cast_kernels
from dar_jax.pipelines.dar_inputs import (
    as_indices,
    check_caption_mask,
    check_condition,
    check_prefix,
)


class PriorPipeline(ModelPipeline[Llama]):
    """Class labels (or captions) to indices."""

    config: LlamaConfig

    @functools.cached_property
    def sampling_params(self) -> Params:
        """Per-layer parameters, matrices as decoding reads them, made once; see `Compute`."""
        params = cast_kernels(self.params, self.model.compute.jnp_dtype)
        return check_finite(decoding_params(params, self.model.compute.decode_weights))

    @functools.cached_property
    def _drafts(self) -> dict[str, "PriorPipeline"]:
        """Those that have guessed for it, by their paths."""
        return {}

    def draft(
        self, sampling: DarSampling, batch_size: int
    ) -> tuple[FunctionalModel[Llama], Params] | None:
        """The smaller prior that guesses with these options, unstacked; its weights are read once.

        Raises:
            ValueError: it cannot be read, or is over other tokens or conditions.
        """
        path = str(sampling.draft)
        if not path or not sampling.window(batch_size):
            return None
        if path not in self._drafts:
            directory, config = open_draft(path, self.config)
            model = FunctionalModel(Llama, config, self.model.compute)
            like = model.abstract_params()
            shardings = None if self.mesh is None else fsdp_sharding(like, self.mesh)
            params = model_dir.load_params(directory, like, shardings)
            self._drafts[path] = PriorPipeline(model, params, mesh=self.mesh)
        draft = self._drafts[path]
        return draft.model.unstacked(), draft.sampling_params

    def logits(
        self, labels: Array | np.ndarray, indices: Shaped[Array | np.ndarray, "B n"]
    ) -> Float[Array, "B n V"]:
        """Teacher-forced logits: position i predicts token i from the tokens before it.

        Args:
            labels: class labels [B] in 0 .. num_classes, or captions [B, T, F].
            indices: image tokens; the last one is not looked at.

        Raises:
            ValueError: a label or token out of range, or another shape.
        """
        labels = self.put(check_condition(labels, self.config, null=True))
        indices = as_indices(indices, self.config.vocab_size)
        check_shape("indices", indices, (len(labels), "n"))
        if not 1 <= indices.shape[1] <= self.config.num_tokens:
            raise ValueError(
                f"indices hold {indices.shape[1]} tokens, expected 1..{self.config.num_tokens}"
            )
        return _logits(self.model, self.params, labels, self.put(indices))

    def generate_indices(
        self,
        labels: Array | np.ndarray | Sequence[int],
        *,
        rng: PRNGKeyArray | int | None = None,
        sampling: DarSampling = DarSampling(),
        prefix: Shaped[Array | np.ndarray, "B K"] | None = None,
        caption_mask: Array | np.ndarray | None = None,
        **options: Any,
    ) -> Int[Array, "B N"]:
        """Generate all tokens of one image per label; the arguments are those of `stream`.

        No key is needed at temperature 0. `labels` may be captions [B, T, F], and no names. What
        `sampling` is best, the pair with a tokenizer knows: `dar.sampling`.
        """
        sampling = dataclasses.replace(sampling, **options)
        if sampling.search.method:
            raise ValueError("search needs the groups of a tokenizer: draw with both models")
        sampling.check(self.config)
        # Greedy decoding draws nothing.
        greedy = sampling.temperature == 0 and rng is None
        rng = 0 if greedy else rng
        config = self.config
        labels = check_condition(labels, config, null=True)
        put = self.put
        groups = draws.generate_indices(
            self.model.unstacked(),
            self.sampling_params,
            put(labels),
            put(image_keys(rng, len(labels))),
            sampling,
            prefix=put(check_prefix(prefix, len(labels), config)),
            key_mask=put(check_caption_mask(caption_mask, len(labels), config)),
            draft=self.draft(sampling, len(labels)),
        )
        return list(groups)[-1]


@functools.partial(jax.jit, static_argnames="model")
def _logits(model: FunctionalModel[Llama], params: Params, labels: Array, indices: Array) -> Array:
    logits = model.bind(params).logits(labels, indices[:, :-1])
    return logits[:, model.config.condition_tokens - 1 :]
