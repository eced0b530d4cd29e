"""Training the D-AR prior: next-token prediction over the codes of a frozen tokenizer.

indices = encode(image)                              frozen tokenizer, no gradient; or cached
                                                     codes, of one crop of those that there are
label -> null label with probability label_dropout   for classifier-free guidance
loss = mean cross-entropy of logits(label, indices[:-1]) against indices
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

from dar_jax.common import image as images
from dar_jax.common.typing import Array, Int, Params, PRNGKeyArray
from dar_jax.losses.cross_entropy import token_cross_entropy
from dar_jax.models.dar import sampler
from dar_jax.models.dar.decoding import decoding_params
from dar_jax.models.dar.llama import Llama, LlamaConfig
from dar_jax.models.dar.options import DarSampling
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.tasks.base import (
    AbstractBatch,
    FrozenModel,
    ModelTask,
    Panel,
    label_shape,
    picture_batch,
)

NUM_PICTURES = 10
PICTURE_GUIDANCE = 2.0


class DarPriorTask(ModelTask):
    """See the module's docstring."""

    def __init__(
        self,
        config: LlamaConfig,
        tokenizer: FrozenModel,
        compute: Compute,
        *,
        from_codes: bool = False,
    ):
        """Build the task.

        Args:
            config: the prior's architecture.
            tokenizer: the frozen tokenizer.
            compute: execution choices of the prior.
            from_codes: batches hold cached codes: the tokenizer only makes pictures.
        """
        self.model = FunctionalModel(Llama, config, compute)
        self.tokenizer, self._tokenizer_params = tokenizer
        self._from_codes = from_codes

    def frozen(self) -> Params:
        return {"tokenizer": self._tokenizer_params}

    def abstract_frozen(self) -> Params:
        return {"tokenizer": self.tokenizer.abstract_params()}

    def abstract_batch(self, batch_size: int) -> AbstractBatch:
        if not self._from_codes:
            return picture_batch(batch_size, self.tokenizer.config.image_size)
        shape = (batch_size, 1, self.model.config.num_tokens)
        codes = jax.ShapeDtypeStruct(shape, jnp.uint16)
        return {"codes": codes, "label": label_shape(batch_size)}

    def loss(
        self, params: Params, batch: Mapping[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> tuple[Array, dict[str, Array]]:
        rng_label, rng_dropout, rng_crop = jax.random.split(rng, 3)
        indices = self._indices(batch, rng_crop, frozen)
        prior = self.model.bind(params)
        labels = prior.drop_condition(
            batch["label"], jax.random.uniform(rng_label, batch["label"].shape)
        )
        hidden = prior.hidden(labels, indices[:, :-1], rng=rng_dropout)
        tokens = token_cross_entropy(
            prior.head,
            hidden[:, self.model.config.condition_tokens - 1 :],
            indices,
            num_chunks=self.model.compute.loss_chunks,
        )
        return tokens.loss, {"token_accuracy": tokens.accuracy}

    def _indices(
        self, batch: Mapping[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> Int[Array, "B N"]:
        if "codes" not in batch:
            image = images.to_float(batch["pixels"])
            with self.tokenizer.in_float32(frozen["tokenizer"]) as tokenizer:
                return tokenizer.encode(image).indices
        batch_size, crops, _ = batch["codes"].shape
        crop = jax.random.randint(rng, (batch_size,), 0, crops)
        return batch["codes"][jnp.arange(batch_size), crop].astype(jnp.int32)

    def metrics(self) -> dict[str, type[metrics.Metric]]:
        return {"token_accuracy": metrics.Average.from_output("token_accuracy")}

    def pictures(
        self, params: Params, batch: Mapping[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> dict[str, Panel]:
        """Rows: samples of the first classes; columns: the previews after each group."""
        del batch
        config = self.model.config
        labels = jnp.arange(NUM_PICTURES) % config.num_classes
        stream = sampler.stream(
            self.model.unstacked(),
            decoding_params(params),
            self.tokenizer,
            frozen["tokenizer"],
            labels,
            jax.random.split(rng, len(labels)),
            DarSampling(guidance_scale=(PICTURE_GUIDANCE,)),
        )
        columns = {
            f"{preview.num_tokens} tokens": images.to_pixels(preview.images) for preview in stream
        }
        cells = np.stack([*columns.values()], axis=1)
        return {"samples": Panel(cells, labels.tolist(), [*columns])}
