"""Signs and directions of the adversarial losses."""

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.losses import adversarial

LOGITS = jnp.array([[-0.5, 0.2], [0.1, 0.7]])


def test_discriminator_raises_real_and_lowers_fake():
    loss = adversarial.logistic_discriminator_loss
    real, fake = jax.grad(loss, argnums=(0, 1))(LOGITS, LOGITS)
    assert np.all(real < 0)
    assert np.all(fake > 0)


def test_generator_raises_fake():
    assert np.all(jax.grad(adversarial.logistic_generator_loss)(LOGITS) < 0)


def test_logistic_losses_do_not_overflow():
    huge = jnp.array([1e4, -1e4])
    assert np.isfinite(adversarial.logistic_discriminator_loss(huge, huge))
    assert np.isfinite(adversarial.logistic_generator_loss(huge))
