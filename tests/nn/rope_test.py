"""Rotary tables in one and two dimensions."""

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.nn.rope import append_identity, apply_rope, rope_1d, rope_2d

HEAD_DIM = 8
BASE = 100.0


def test_one_dimensional_angles():
    rope = rope_1d(5, HEAD_DIM, BASE)
    angles = np.arange(5)[:, None] * BASE ** (-2 * np.arange(4) / HEAD_DIM)
    np.testing.assert_allclose(rope.cos, np.cos(angles), rtol=1e-6)
    np.testing.assert_allclose(rope.sin, np.sin(angles), rtol=1e-6)


def test_two_dimensional_halves_turn_with_row_and_column():
    rope = rope_2d(3, 4, HEAD_DIM, BASE)
    half = rope_1d(4, HEAD_DIM // 2, BASE)
    for row in range(3):
        for column in range(4):
            expected = np.concatenate([half.cos[row], half.cos[column]])
            np.testing.assert_array_equal(rope.cos[4 * row + column], expected)


def test_rotation_turns_interleaved_pairs():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, HEAD_DIM))
    rope = rope_1d(5, HEAD_DIM, BASE)
    rotated = np.asarray(apply_rope(x, rope))
    pairs = np.asarray(x[..., 0::2]) + 1j * np.asarray(x[..., 1::2])
    turn = np.asarray(rope.cos) + 1j * np.asarray(rope.sin)
    expected = pairs * turn[:, None]
    np.testing.assert_allclose(rotated[..., 0::2], expected.real, atol=1e-6)
    np.testing.assert_allclose(rotated[..., 1::2], expected.imag, atol=1e-6)


def test_identity_positions_are_not_rotated():
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, HEAD_DIM))
    rotated = apply_rope(x, append_identity(rope_1d(3, HEAD_DIM, BASE), 2))
    np.testing.assert_array_equal(rotated[:, 3:], x[:, 3:])
    assert jnp.all(rotated[:, 1:3] != x[:, 1:3])


def test_rotation_keeps_the_compute_dtype():
    x = jnp.ones((1, 3, 2, HEAD_DIM), jnp.bfloat16)
    assert apply_rope(x, rope_1d(3, HEAD_DIM, BASE)).dtype == jnp.bfloat16
