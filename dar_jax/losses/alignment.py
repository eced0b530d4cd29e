"""Representation alignment: REPA (Yu et al. 2024, arXiv:2410.06940), cosine form.

    loss = mean(1 - cos(target, predicted))

`target` are features of a frozen encoder, `predicted` the output of a head on intermediate tokens.
"""

import jax
import jax.numpy as jnp

from dar_jax.common.typing import Array, Float

MIN_NORM = 1e-8  # torch.nn.functional.cosine_similarity


def cosine_similarity(
    a: Float[Array, "*batch D"], b: Float[Array, "*batch D"]
) -> Float[Array, "*batch"]:
    """Cosine along the last axis, float32; each norm is clamped at 1e-8, so zeros give 0."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.sum(a * b, axis=-1) / (_norm(a) * _norm(b))


def alignment_loss(
    target: Float[Array, "*batch D"], predicted: Float[Array, "*batch D"]
) -> Float[Array, ""]:
    """Mean of 1 - cosine over all tokens; no gradient flows to `target`."""
    return jnp.mean(1.0 - cosine_similarity(jax.lax.stop_gradient(target), predicted))


def _norm(x: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
    # The clamp sits inside the root: sqrt has no finite gradient at 0.
    return jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1), MIN_NORM**2))
