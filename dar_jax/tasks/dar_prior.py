"""Training the D-AR prior: next-token prediction over the codes of a frozen tokenizer.

indices = encode(image)                              frozen tokenizer, no gradient; or cached
                                                     codes, of one crop of those that there are
label -> null label with probability label_dropout   for classifier-free guidance
loss = mean cross-entropy of logits(label, indices[:-1]) against indices

A prior of captions has cached features [T, F] for a label, which end with the last token of the
caption: nothing attends to the padding before it, as in the reference's `train_t2i.py`. A dropped
caption becomes the null caption behind the same padding. The reference's `valid`, which takes
pictures without a caption out of the loss, has no counterpart: they are left out of the data.
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
from dar_jax.models.dar.llama import Llama, LlamaConfig, training_mask
from dar_jax.models.dar.options import DarSampling
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.tasks.base import (
    AbstractBatch,
    FrozenModel,
    ModelTask,
    Panel,
    average,
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
        config = self.model.config
        batch = picture_batch(batch_size, self.tokenizer.config.image_size)
        if self._from_codes:
            codes = jax.ShapeDtypeStruct((batch_size, 1, config.num_tokens), jnp.uint16)
            batch = {"codes": codes, "label": label_shape(batch_size)}
        if config.caption_dim is not None:
            shape = (batch_size, config.condition_tokens, config.caption_dim)
            batch["captions"] = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
            batch["caption_mask"] = jax.ShapeDtypeStruct(shape[:2], jnp.bool_)
        return batch

    def loss(
        self, params: Params, batch: Mapping[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> tuple[Array, dict[str, Array]]:
        rng_label, rng_dropout, rng_crop = jax.random.split(rng, 3)
        indices = self._indices(batch, rng_crop, frozen)
        prior = self.model.bind(params)
        condition, mask = self._condition(batch)
        draws = jax.random.uniform(rng_label, (len(condition),))
        condition = prior.drop_condition(condition, draws)
        hidden = prior.hidden(condition, indices[:, :-1], mask=mask, rng=rng_dropout)
        tokens = token_cross_entropy(
            prior.head,
            hidden[:, self.model.config.condition_tokens - 1 :],
            indices,
            num_chunks=self.model.compute.loss_chunks,
        )
        return tokens.loss, {"token_accuracy": tokens.accuracy}

    def _condition(self, batch: Mapping[str, Array]) -> tuple[Array, Array | None]:
        """Return labels, or captions and who may attend to whom: [B, S, S], S = T + N - 1."""
        config = self.model.config
        if config.caption_dim is None:
            return batch["label"], None
        mask = training_mask(batch["caption_mask"], config.num_tokens)
        return batch["captions"].astype(jnp.float32), mask

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
        return {"token_accuracy": average("token_accuracy")}

    def pictures(
        self, params: Params, batch: Mapping[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> dict[str, Panel]:
        """Rows: samples of the first classes, or held-out captions; columns: the previews."""
        config = self.model.config
        key_mask, labels = None, jnp.arange(NUM_PICTURES) % config.num_classes
        condition, names = labels, labels.tolist()
        if config.caption_dim is not None:
            condition, _ = self._condition(batch)
            condition, key_mask = condition[:NUM_PICTURES], batch["caption_mask"][:NUM_PICTURES]
            names = [f"caption {number}" for number in range(1, len(condition) + 1)]
        stream = sampler.stream(
            self.model.unstacked(),
            decoding_params(params, self.model.compute.decode_weights),
            self.tokenizer,
            frozen["tokenizer"],
            condition,
            jax.random.split(rng, len(condition)),
            DarSampling(guidance_scale=(PICTURE_GUIDANCE,)),
            key_mask=key_mask,
        )
        columns = {
            f"{preview.num_tokens} tokens": images.to_pixels(preview.images) for preview in stream
        }
        cells = np.stack([*columns.values()], axis=1)
        return {"samples": Panel(cells, names, [*columns])}
