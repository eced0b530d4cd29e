"""Next-token cross-entropy that never holds all logits at once.

The logits [B, N, V] of a large vocabulary, their softmax and its gradient are float32 and dwarf
every other activation. Here the output layer and the loss run on one piece of the sequence after
the other, and the backward pass computes each piece's logits again: one more product with the
output layer, for a fraction of the memory. Values and gradients are those of the whole.
"""

from collections.abc import Callable
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp

from dar_jax.common.typing import Array, Float, Int


class TokenLoss(NamedTuple):
    """Means over all tokens: `loss` in nats, and `accuracy` of the most likely token."""

    loss: Array
    accuracy: Array


def token_cross_entropy(
    head: Callable[[Array], Array],
    hidden: Float[Array, "B N D"],
    targets: Int[Array, "B N"],
    *,
    num_chunks: int = 1,
) -> TokenLoss:
    """Mean cross-entropy of `head(hidden)` against `targets`.

    Args:
        head: the output layer, [B, n, D] to float32 logits [B, n, V], a position at a time.
        hidden: inputs of the head.
        targets: the tokens to predict.
        num_chunks: pieces of the sequence that run one after the other; 1 computes all at once
            and nothing twice.

    Raises:
        ValueError: the sequence does not divide into the pieces.
    """
    num_tokens = targets.shape[1]
    if num_tokens % num_chunks:
        raise ValueError(
            f"compute.loss_chunks {num_chunks} does not divide the {num_tokens} tokens; "
            "choose a number that does"
        )
    if num_chunks == 1:
        sums = _sums(head, hidden, targets)
    else:
        # The batch axis is left alone: it is the one that is split over devices.
        pieces = tuple(
            einops.rearrange(array, "b (chunks n) ... -> chunks b n ...", chunks=num_chunks)
            for array in (hidden, targets)
        )

        @jax.checkpoint
        def body(total: TokenLoss, piece: tuple[Array, Array]) -> tuple[TokenLoss, None]:
            return jax.tree.map(jnp.add, total, _sums(head, *piece)), None

        sums, _ = jax.lax.scan(body, TokenLoss(jnp.zeros(()), jnp.zeros(())), pieces)
    return TokenLoss(*(total / targets.size for total in sums))


def _sums(head: Callable[[Array], Array], hidden: Array, targets: Array) -> TokenLoss:
    logits = head(hidden)
    hits = jnp.argmax(logits, axis=-1) == targets
    losses = _cross_entropy(logits, targets)
    return TokenLoss(jnp.sum(losses), jnp.sum(hits, dtype=jnp.float32))


@jax.custom_vjp
def _cross_entropy(logits: Array, targets: Array) -> Array:
    """Of logits [B, n, V] against targets [B, n]: losses [B, n].

    The gradient, softmax - one-hot, is one elementwise pass over the logits; autodiff scatters into
    an array of their size instead.
    """
    return _cross_entropy_forward(logits, targets)[0]


def _cross_entropy_forward(logits, targets):
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    return (normaliser - picked)[..., 0], (logits, normaliser, targets)


def _cross_entropy_backward(residuals, gradient):
    logits, normaliser, targets = residuals
    one_hot = targets[..., None] == jnp.arange(logits.shape[-1])
    return gradient[..., None] * (jnp.exp(logits - normaliser) - one_hot), None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
