"""The exact likelihood of codes under the D-AR prior, teacher-forced:

    log p(indices | condition) = sum_i log p(token i | condition, tokens before i)

and, by Bayes' rule with equally likely classes, p(label | indices) from that of every class. It is
the likelihood of the codes, not of the pixels that a tokenizer makes of them. One forward pass
scores all tokens of an image under one condition. Nothing is shared between the passes of several
classes: the class is the first token, and what every layer computes of the others depends on it.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dar_jax.common.typing import Array, Bool, Float, Int, Params
from dar_jax.models.dar.llama import Llama, training_mask
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.nn.layout import in_parts


@dataclasses.dataclass(frozen=True)
class LogLikelihood:
    """How likely the codes of B images are.

    Attributes:
        tokens: log-probability of every token given those before it, nats, float32 [B, N].
        num_pixels: of an image.
    """

    tokens: Float[Array | np.ndarray, "B N"]
    num_pixels: int

    @property
    def images(self) -> Float[Array | np.ndarray, " B"]:
        """Log-probability of the codes of every image, nats; `np.argsort(-images)` ranks them."""
        return self.tokens.sum(axis=1)

    @property
    def bits_per_pixel(self) -> Float[Array | np.ndarray, " B"]:
        """Length of an ideal code of the tokens, bits per pixel of the image."""
        return -self.images / (math.log(2) * self.num_pixels)

    def deviation_from(self, reference: "LogLikelihood") -> Float[Array | np.ndarray, " B"]:
        """Surprise against that of other images: an out-of-distribution score, higher is stranger.

        It is (s - mean(reference)) / deviation(reference) of the surprise s, nats per token. Simple
        pictures of any kind are likely under any model of images, so a low score proves nothing.

        Args:
            reference: of images of the training distribution, scored with labels in the same way.
        """
        known = -reference.tokens.mean(axis=1)
        return (-self.tokens.mean(axis=1) - known.mean()) / known.std()


@functools.partial(jax.jit, static_argnames=("model", "microbatch"))
def token_log_likelihood(
    model: FunctionalModel[Llama],
    params: Params,
    condition: Array,
    indices: Int[Array, "B n"],
    *,
    caption_mask: Bool[Array, "B T"] | None = None,
    microbatch: int | None = None,
) -> Float[Array, "B n"]:
    """Log-probability of every token given the condition and the tokens before it, float32.

    Args:
        model: the prior.
        params: its parameters.
        condition: labels [B] (`num_classes` is the null label: no class is given), or captions
            [B, T, F].
        indices: all tokens of an image, or its first n.
        caption_mask: False for padded tokens of captions.
        microbatch: images that the prior sees at a time, a divisor of B; None is all.
    """
    prior = model.bind(params)

    def of_part(condition: Array, indices: Array, caption_mask: Array | None = None) -> Array:
        mask = caption_mask
        if caption_mask is not None:
            mask = training_mask(caption_mask, indices.shape[1])
        hidden = prior.hidden(condition, indices[:, :-1], mask=mask)
        logits = prior.head(hidden[:, model.config.condition_tokens - 1 :])
        return -optax.softmax_cross_entropy_with_integer_labels(logits, indices)

    given = () if caption_mask is None else (caption_mask,)
    return in_parts(of_part, microbatch)(condition, indices, *given)


@functools.partial(jax.jit, static_argnames=("model", "microbatch"))
def class_log_likelihoods(
    model: FunctionalModel[Llama],
    params: Params,
    indices: Int[Array, "B n"],
    *,
    microbatch: int | None = None,
) -> Float[Array, "B classes"]:
    """Log-probability of the tokens under every class: one forward pass after another.

    The arguments are those of `token_log_likelihood`, whose memory this takes.
    """

    def of_class(label: Array) -> Array:
        labels = label + jnp.zeros_like(indices[:, 0])  # split over devices as the indices are
        tokens = token_log_likelihood(model, params, labels, indices, microbatch=microbatch)
        return tokens.sum(axis=1)

    return jax.lax.map(of_class, jnp.arange(model.config.num_classes)).T
