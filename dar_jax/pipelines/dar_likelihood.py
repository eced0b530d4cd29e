"""What D-AR models know exactly: the likelihood of codes, and the classes that follow from it."""

import abc

import jax
import numpy as np

from dar_jax.common.checks import check_microbatch, check_shape
from dar_jax.common.typing import Array, Float, Int
from dar_jax.models.dar import likelihood
from dar_jax.models.dar.llama import Llama
from dar_jax.pipelines.base import Labels, ModelPipeline, Pipeline
from dar_jax.pipelines.dar_inputs import as_indices, check_caption_mask, check_condition
from dar_jax.pipelines.dar_prompts import encode_texts


class LikelihoodPipeline(Pipeline, abc.ABC):
    """A prior over the codes of a tokenizer, which scores them."""

    has_likelihood = True
    prior: ModelPipeline[Llama]

    def log_likelihood(
        self,
        images_or_indices: Array | np.ndarray,
        labels: Labels,
        *,
        caption_mask: Array | np.ndarray | None = None,
        microbatch: int | None = None,
    ) -> likelihood.LogLikelihood:
        """Score codes exactly, in one forward pass: `.tokens` [B, N], `.images` [B] in nats.

        `np.argsort(-dar.log_likelihood(out.indices, labels).images)` ranks samples, and with the
        null label `num_classes` they are scored without a class.

        Args:
            images_or_indices: images [B, H, W, 3] in [-1, 1], which are encoded, or codes [B, N].
            labels: classes by index (0 .. num_classes) or name, [B]; or texts, or captions
                [B, T, F].
            caption_mask: False for padded caption tokens [B, T].
            microbatch: images that the prior sees at a time, a divisor of B: bounds memory.

        Raises:
            ValueError: another shape, a label or code out of range, or a batch that does not divide
                over the mesh.
        """
        config, put = self.prior.config, self.prior.put
        labels, caption_mask = encode_texts(config, labels, caption_mask)
        labels = check_condition(self.class_indices(labels), config, null=True)
        caption_mask = check_caption_mask(caption_mask, len(labels), config)
        indices = self._indices_of(images_or_indices)
        check_shape("images_or_indices", indices, (len(labels), self.num_tokens))
        tokens = likelihood.token_log_likelihood(
            self.prior.model,
            self.prior.params,
            put(labels),
            indices,
            caption_mask=put(caption_mask),
            microbatch=check_microbatch(microbatch, len(labels)),
        )
        return likelihood.LogLikelihood(tokens, self.image_size**2)

    def class_log_likelihoods(
        self, images_or_indices: Array | np.ndarray, *, microbatch: int | None = None
    ) -> Float[Array, "B classes"]:
        """Log-probability of the codes under every class, nats: one forward pass per class.

        The arguments and errors are those of `log_likelihood`; a model of captions has no classes.
        """
        if self.prior.config.caption_dim is not None:
            raise ValueError("a model of captions has no classes; score captions one by one")
        indices = self._indices_of(images_or_indices)
        microbatch = check_microbatch(microbatch, len(indices))
        prior = self.prior
        return likelihood.class_log_likelihoods(
            prior.model, prior.params, indices, microbatch=microbatch
        )

    def classify(
        self, images_or_indices: Array | np.ndarray, *, microbatch: int | None = None
    ) -> Float[Array, "B classes"]:
        """Posterior over equally likely classes; see `class_log_likelihoods`."""
        scores = self.class_log_likelihoods(images_or_indices, microbatch=microbatch)
        return jax.nn.softmax(scores, axis=1)

    def _indices_of(self, images_or_indices: Array | np.ndarray) -> Int[Array, "B N"]:
        """Encode images; check codes."""
        if np.ndim(images_or_indices) == 4:
            shape = ("B", self.image_size, self.image_size, 3)
            check_shape("images_or_indices", images_or_indices, shape)
            return self.autoencoder.encode(images_or_indices)
        indices = as_indices(images_or_indices, self.prior.config.vocab_size)
        check_shape("images_or_indices", indices, ("B", self.num_tokens))
        return self.prior.put(indices)
