"""The cross-entropy in pieces equals the plain one, in value, accuracy and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.losses.cross_entropy import token_cross_entropy

RTOL = 1e-6  # sums in another order
BATCH, TOKENS, DIM, VOCAB = 3, 8, 5, 11


def draw(seed=0):
    rngs = jax.random.split(jax.random.key(seed), 3)
    kernel = jax.random.normal(rngs[0], (DIM, VOCAB))
    hidden = jax.random.normal(rngs[1], (BATCH, TOKENS, DIM))
    targets = jax.random.randint(rngs[2], (BATCH, TOKENS), 0, VOCAB)
    targets = targets.at[:, :2].set(jnp.argmax(hidden[:, :2] @ kernel, axis=-1))  # some are right
    return kernel, hidden, targets


def loss(kernel, hidden, targets, num_chunks):
    out = token_cross_entropy(lambda x: x @ kernel, hidden, targets, num_chunks=num_chunks)
    return out.loss, out.accuracy


def plain(kernel, hidden, targets):
    log_probs = jax.nn.log_softmax(hidden @ kernel)
    picked = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)
    return -jnp.mean(picked), jnp.mean(jnp.argmax(log_probs, axis=-1) == targets)


@pytest.mark.parametrize("num_chunks", [1, 2, 8])
def test_pieces_equal_the_whole(num_chunks):
    arrays = draw()
    expected = jax.value_and_grad(plain, argnums=(0, 1), has_aux=True)(*arrays)
    got = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*arrays, num_chunks)
    assert 0 < expected[0][1] < 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=RTOL, atol=RTOL), got, expected)


def test_pieces_never_hold_all_logits():
    arrays = draw()
    shapes = lambda count: str(jax.make_jaxpr(jax.grad(lambda *a: loss(*a, count)[0]))(*arrays))  # noqa: E731
    whole = f"[{BATCH},{TOKENS},{VOCAB}]"
    assert whole in shapes(1)
    assert whole not in shapes(4)
    assert f"[4,{BATCH},2,{VOCAB}]" not in shapes(4)  # nor as residuals of a scan


def test_pieces_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="loss_chunks 3 does not divide the 8 tokens"):
        loss(*draw(), 3)
