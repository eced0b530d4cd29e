"""The quantiser against the reference, its gradients, and its corner cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dar_jax.models.dar.quantizer import (
    Quantizer,
    dead_code_rate,
    entropy_loss,
    l2_normalize,
    quantization_losses,
)
from tests.golden import fixtures

FOLDER = "dar/quantizer"
SEED = 15
USAGE_QUEUE = 65536
USAGE_PUSHED = 512


def bind(codebook):
    quantizer = Quantizer(*codebook.shape, rngs=nnx.Rngs(0))
    quantizer.codebook[...] = codebook
    return quantizer


@jax.jit
def evaluate(codebook, z, last_query):
    quantizer = bind(codebook)
    quantized = quantizer(z)
    distances = quantizer.distances(quantized.z)
    ordered = jnp.sort(distances, axis=-1)
    margin = ordered[..., 1] - ordered[..., 0]
    return quantized, margin, quantization_losses(quantized, last_query), entropy_loss(distances)


def usage(queue, indices, codebook_size):
    """The reference's usage statistic: distinct codes in a queue that starts as zeros."""
    pushed = np.asarray(indices).reshape(-1)[:USAGE_PUSHED]
    queue = np.concatenate([queue[USAGE_PUSHED:], pushed])
    return queue, len(np.unique(queue)) / codebook_size


def test_quantizer_equals_the_reference():
    config = fixtures.load_json(FOLDER, "config")
    codebook = fixtures.load_state_dict(FOLDER)["embedding.weight"]
    with fixtures.Compare(FOLDER) as golden:
        z, last_query = golden.arrays["z"], golden.arrays["query_ids"][:, -1]
        weights = fixtures.make(SEED, "input/w", z.shape)

        def total(codebook, z):
            quantized, _, losses, entropy = evaluate(codebook, z, last_query)
            linear = jnp.sum(quantized.codes * weights) / z.shape[1]
            return sum(losses) + config["entropy_loss_ratio"] * entropy + linear

        quantized, margin, losses, entropy = evaluate(codebook, z, last_query)
        queue, first = usage(np.zeros(USAGE_QUEUE), quantized.indices, config["n_e"])
        second_indices = evaluate(codebook, golden.arrays["z2"], last_query)[0].indices
        grad_codebook, grad_z = jax.jit(jax.grad(total, argnums=(0, 1)))(codebook, z)
        golden.check_all(
            codes=quantized.indices,
            quant=quantized.codes,
            code_margin=margin,
            vq_loss=losses.codebook,
            commit_loss=losses.commitment,
            entropy_loss=config["entropy_loss_ratio"] * entropy,
            usage_first=first,
            usage_second=usage(queue, second_indices, config["n_e"])[1],
            dead_code_rate=dead_code_rate(quantized.codes),
            grad_z=grad_z,
            grad_embedding=grad_codebook,
        )


def test_first_index_wins_ties():
    codebook = jnp.array([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0]])
    quantized = jax.jit(lambda z: bind(codebook)(z))(jnp.array([[[5.0, 0.0]]]))
    assert quantized.indices.item() == 1


def test_reconstruction_gradient_reaches_z_and_not_the_codebook():
    codebook = jax.random.normal(jax.random.key(0), (8, 4))
    z = jax.random.normal(jax.random.key(1), (2, 3, 4))
    weights = jax.random.normal(jax.random.key(2), z.shape)

    def through(codebook, z):
        return jnp.sum(weights * bind(codebook)(z).codes)

    def normalised(z):
        return jnp.sum(weights * l2_normalize(z))

    grad_codebook, grad_z = jax.jit(jax.grad(through, argnums=(0, 1)))(codebook, z)
    np.testing.assert_array_equal(grad_codebook, 0.0)
    np.testing.assert_allclose(grad_z, jax.grad(normalised)(z), rtol=1e-6)


def test_losses_count_tokens_up_to_the_last_query():
    codebook = jax.random.normal(jax.random.key(0), (8, 4))
    z = jax.random.normal(jax.random.key(1), (2, 6, 4))
    quantized, _, losses, _ = evaluate(codebook, z, jnp.array([0, 3]))
    error = np.mean(np.square(np.asarray(quantized.nearest - quantized.z)), axis=-1)
    expected = (error[0, :1].sum() + error[1, :4].sum()) / 5
    np.testing.assert_allclose(losses, (expected, 0.25 * expected), rtol=1e-5)


def test_zero_vector_has_finite_gradient():
    gradient = jax.grad(lambda z: jnp.sum(l2_normalize(z) ** 2))(jnp.zeros((2, 4)))
    assert np.all(np.isfinite(gradient))


def test_dead_code_rate_is_the_share_of_constant_positions():
    codes = jax.random.normal(jax.random.key(0), (4, 10, 3)).at[:, :3].set(1.0)
    assert dead_code_rate(codes) == pytest.approx(0.3)


def test_fresh_codebook_has_unit_rows():
    codebook = Quantizer(16, 8, rngs=nnx.Rngs(0)).codebook[...]
    np.testing.assert_allclose(jnp.linalg.norm(codebook, axis=-1), 1.0, rtol=1e-6)
