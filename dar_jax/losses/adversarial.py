"""Adversarial losses on patch logits.

    discriminator:  hinge     (mean(relu(1 - real)) + mean(relu(1 + fake))) / 2
                    logistic  (mean(softplus(-real)) + mean(softplus(fake))) / 2
    generator:      hinge     -mean(fake)
                    logistic  mean(softplus(-fake))     (non-saturating, Goodfellow et al. 2014)

The reference lists the logistic discriminator loss twice, as "vanilla" (softplus) and as
"non-saturating" (binary cross-entropy with logits): they are the same function.
"""

import jax
import jax.numpy as jnp

from dar_jax.common.typing import Array, Float


def hinge_discriminator_loss(
    real: Float[Array, "*batch"], fake: Float[Array, "*batch"]
) -> Float[Array, ""]:
    """Push real logits above 1 and generated logits below -1."""
    return 0.5 * (jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + fake)))


def hinge_generator_loss(fake: Float[Array, "*batch"]) -> Float[Array, ""]:
    """Raise the logits of generated images."""
    return -jnp.mean(fake)


def logistic_discriminator_loss(
    real: Float[Array, "*batch"], fake: Float[Array, "*batch"]
) -> Float[Array, ""]:
    """Cross-entropy of real against generated."""
    return 0.5 * (jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake)))


def logistic_generator_loss(fake: Float[Array, "*batch"]) -> Float[Array, ""]:
    """Non-saturating generator loss."""
    return jnp.mean(jax.nn.softplus(-fake))


def time_weighted(loss: Float[Array, ""], t: Float[Array, " B"]) -> Float[Array, ""]:
    """Scale a loss by the mean time of the batch.

    Parity: the reference averages before it weights, so a sample is not weighted by its own time.
    """
    return jnp.mean(t) * loss
