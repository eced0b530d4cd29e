"""Adversarial losses on patch logits.

    discriminator  (mean(softplus(-real)) + mean(softplus(fake))) / 2
    generator      mean(softplus(-fake))     (non-saturating, Goodfellow et al. 2014)

The reference lists the discriminator's loss twice, as "vanilla" (softplus) and as "non-saturating"
(binary cross-entropy with logits): they are the same function. Its hinge losses, which no recipe
takes, are left out.
"""

import jax
import jax.numpy as jnp

from dar_jax.common.typing import Array, Float


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
