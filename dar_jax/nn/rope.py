"""Rotary position embedding on interleaved channel pairs (2i, 2i + 1), in one and two dimensions.

Pair i at position p is rotated by the angle p * base**(-2i / dim). In two dimensions the first
half of the pairs rotates with the row index, the second half with the column index, each with
dim = head_dim / 2 (reference: `axes_dim = [32, 32]` for head_dim 64). Tables are computed in
float64 on the host; the rotation itself is float32 whatever the compute dtype.
"""

from typing import NamedTuple

import einops
import jax.numpy as jnp
import numpy as np

from dar_jax.common.typing import Array, Float


class Rope(NamedTuple):
    """Rotation of N positions: `cos` and `sin` are float32 [N, head_dim / 2], or [B, N, ...]."""

    cos: Array
    sin: Array

    def __getitem__(self, positions) -> "Rope":
        """Select positions (a slice or an index array)."""
        return Rope(self.cos[positions], self.sin[positions])


def rope_1d(num_positions: int, head_dim: int, base: float) -> Rope:
    """Table for positions 0 .. num_positions - 1."""
    return _rope(_angles(np.arange(num_positions), head_dim, base))


def rope_2d(height: int, width: int, head_dim: int, base: float) -> Rope:
    """Table for a row-major grid: [height * width, head_dim / 2]."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    angles = [_angles(axis.reshape(-1), head_dim // 2, base) for axis in (rows, columns)]
    return _rope(np.concatenate(angles, axis=-1))


def append_identity(rope: Rope, num_positions: int) -> Rope:
    """Append positions that are not rotated."""
    shape = (num_positions, rope.cos.shape[-1])
    return Rope(
        jnp.concatenate([rope.cos, jnp.ones(shape)]), jnp.concatenate([rope.sin, jnp.zeros(shape)])
    )


def apply_rope(x: Float[Array, "B N heads head_dim"], rope: Rope) -> Array:
    """Rotate every head of every token by its position's angles."""
    cos, sin = rope.cos[..., None, :], rope.sin[..., None, :]  # [N, 1, head_dim / 2]
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return einops.rearrange(rotated, "b n h pairs two -> b n h (pairs two)").astype(x.dtype)


def _angles(positions: np.ndarray, dim: int, base: float) -> np.ndarray:
    frequencies = float(base) ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    return positions[:, None] * frequencies


def _rope(angles: np.ndarray) -> Rope:
    return Rope(jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32))
