"""Training the D-AR prior: next-token prediction over the codes of a frozen tokenizer.

indices = encode(image)                              frozen tokenizer, no gradient; or cached
                                                     codes, of one crop of those that there are
label -> null label with probability label_dropout   for classifier-free guidance
loss = mean cross-entropy of logits(label, indices[:-1]) against indices
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

from dar_jax.common import image as images
from dar_jax.common import model_dir
from dar_jax.common.typing import Array, Int, Params, PRNGKeyArray
from dar_jax.losses.cross_entropy import token_cross_entropy
from dar_jax.models.dar import sampler, work
from dar_jax.models.dar.llama import Llama, LlamaConfig
from dar_jax.models.dar.tokenizer import Tokenizer, TokenizerConfig
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.nn.stack import unstack
from dar_jax.sampling.logits import SamplingConfig, guidance_schedule
from dar_jax.tasks.base import ModelTask, load_frozen

NUM_PICTURES = 10
PICTURE_GUIDANCE = 2.0


class DarPriorTask(ModelTask):
    """See the module's docstring."""

    kind = "dar_prior"

    def __init__(
        self,
        config: LlamaConfig,
        tokenizer: str,
        compute: Compute,
        *,
        shape_of_tokenizer: TokenizerConfig | None = None,
        from_codes: bool = False,
    ):
        """Load the tokenizer from its model directory.

        Args:
            config: the prior's architecture.
            tokenizer: model directory of the tokenizer.
            compute: execution choices.
            shape_of_tokenizer: for compiling without weights: `tokenizer` is not read, and `frozen`
                gives the shapes of such a tokenizer's parameters.
            from_codes: batches hold cached codes: the tokenizer only makes pictures.

        Raises:
            ValueError: it cannot be read, is no tokenizer, or does not fit the prior.
        """
        self.model = FunctionalModel(Llama, config, compute)
        self.tokenizer, self._tokenizer_params = load_frozen(
            Tokenizer,
            TokenizerConfig,
            "dar_tokenizer",
            tokenizer,
            # Codes are drawn in float32 whatever trains on them: bfloat16 flips close calls.
            compute=dataclasses.replace(compute, dtype="float32"),
            shape=shape_of_tokenizer,
        )
        sampler.check_pair(config, self.tokenizer.config, tokenizer)
        self._tokenizer_path = tokenizer
        self._from_codes = from_codes

    @property
    def flops_per_image(self) -> float:
        """Of the prior, and of the tokenizer's encoder in front of it where there is one."""
        encode = 0 if self._from_codes else work.encode_flops(self.tokenizer.config)
        return float(work.prior_train_flops(self.model.config) + encode)

    def frozen(self) -> Params:
        return {"tokenizer": self._tokenizer_params}

    def abstract_frozen(self) -> Params:
        return {"tokenizer": self.tokenizer.abstract_params()}

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
            return self.tokenizer.bind(frozen["tokenizer"]).encode(image).indices
        batch_size, crops, _ = batch["codes"].shape
        crop = jax.random.randint(rng, batch_size, 0, crops)
        return batch["codes"][jnp.arange(batch_size), crop].astype(jnp.int32)

    def metrics(self) -> dict[str, type[metrics.Metric]]:
        return {"token_accuracy": metrics.Average.from_output("token_accuracy")}

    def pictures(
        self, params: Params, batch: Mapping[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> dict[str, np.ndarray]:
        """Rows: samples of the first classes; columns: the previews after each group."""
        del batch
        config = self.model.config
        labels = jnp.arange(NUM_PICTURES) % config.num_classes
        stream = sampler.stream(
            self.model.unstacked(),
            unstack(params),
            self.tokenizer,
            frozen["tokenizer"],
            labels,
            jax.random.split(rng, len(labels)),
            guidance_schedule(PICTURE_GUIDANCE, config.num_tokens),
            sampling=SamplingConfig(),
        )
        columns = [images.to_pixels(preview.images) for preview in stream]
        return {"samples": images.side_by_side(np.stack(columns))}

    def companions(self) -> dict[str, str]:
        return {model_dir.TOKENIZER_NAME: str(model_dir.locate(self._tokenizer_path))}
