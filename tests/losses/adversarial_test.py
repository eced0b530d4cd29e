"""Signs and directions of the adversarial losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.losses import adversarial

DISCRIMINATOR = (adversarial.hinge_discriminator_loss, adversarial.logistic_discriminator_loss)
GENERATOR = (adversarial.hinge_generator_loss, adversarial.logistic_generator_loss)
LOGITS = jnp.array([[-0.5, 0.2], [0.1, 0.7]])


@pytest.mark.parametrize("loss", DISCRIMINATOR)
def test_discriminator_raises_real_and_lowers_fake(loss):
    real, fake = jax.grad(loss, argnums=(0, 1))(LOGITS, LOGITS)
    assert np.all(real < 0)
    assert np.all(fake > 0)


@pytest.mark.parametrize("loss", GENERATOR)
def test_generator_raises_fake(loss):
    assert np.all(jax.grad(loss)(LOGITS) < 0)


def test_hinge_ignores_confident_logits():
    gradients = jax.grad(adversarial.hinge_discriminator_loss, argnums=(0, 1))(
        jnp.full((2, 2), 1.5), jnp.full((2, 2), -1.5)
    )
    np.testing.assert_array_equal(gradients, 0.0)


def test_logistic_losses_do_not_overflow():
    huge = jnp.array([1e4, -1e4])
    assert np.isfinite(adversarial.logistic_discriminator_loss(huge, huge))
    assert np.isfinite(adversarial.logistic_generator_loss(huge))
