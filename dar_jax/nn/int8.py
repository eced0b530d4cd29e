"""Arrays in int8 with a float32 scale for each row along an axis: half the bytes of bfloat16.

scale = max |x| / 127 along the axis, value = round(x / scale), |x - value * scale| <= scale / 2.
A row of zeros has the scale 1. Whole numbers up to 127 are exact in bfloat16, so that a product
converts them where it reads them and scales the sums.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from dar_jax.common.typing import Any, Array, Float, Params
from dar_jax.nn.target import traced_devices

LARGEST = 127
COLUMNS = 256
"""Of a matrix that CPUs convert at a time."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """Stands in the place of an array of `dtype`.

    Attributes:
        values: int8, of the array's shape.
        scales: float32, likewise, but for a length of 1 along the axis that shares them.
        dtype: of the array, in which products take it.
    """

    values: Any  # arrays, or their shapes
    scales: Any
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def astype(self, dtype: Any) -> "Int8":
        """The same array in another dtype."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def read_after(self, other: Array | int) -> "Int8":
        """The same array, for programs to read after `other` is known.

        They would convert it once before a loop, and read that copy in every turn.
        """
        values, _ = jax.lax.optimization_barrier((self.values, jnp.asarray(other)))
        return dataclasses.replace(self, values=values)

    def whole(self) -> Float[Array, "..."]:
        """The array."""
        return (self.values * self.scales).astype(self.dtype)


@functools.partial(jax.jit, static_argnames="axis")
def quantize(x: Float[Array, "..."], *, axis: int) -> Int8:
    """Round to int8, with one scale along `axis`; a row that is not finite has NaN for one."""
    wide = x.astype(jnp.float32)
    # The largest number does not tell: XLA for CPUs may take it without NaN.
    is_finite = jnp.isfinite(wide).all(axis=axis, keepdims=True)
    largest = jnp.max(jnp.abs(wide), axis=axis, keepdims=True)
    # Smaller ones are flushed to zero by some devices.
    is_zero = largest < LARGEST * jnp.finfo(jnp.float32).tiny
    scales = jnp.where(is_zero, 1.0, largest / LARGEST)
    scales = jnp.where(is_finite, scales, jnp.nan)
    return Int8(jnp.round(wide / scales).astype(jnp.int8), scales, x.dtype)


def matmul(
    x: Float[Array, "*batch D"], matrix: Float[Array, "D F"] | Int8, result_dtype: Any
) -> Float[Array, "*batch F"]:
    """Multiply rows by a matrix, which has their dtype; sums are float32 before they are scaled."""
    product = functools.partial(jnp.einsum, "...i,io->...o", x)
    if not isinstance(matrix, Int8):
        return product(matrix, preferred_element_type=result_dtype)
    # XLA for CPUs converts before the product, not in it: a few columns at a time stay in caches.
    num_columns = matrix.shape[1]
    is_in_turns = traced_devices()[0].platform == "cpu"
    turn = math.gcd(num_columns, COLUMNS) if is_in_turns else num_columns

    def columns(start: Array | int) -> Array:
        values = jax.lax.dynamic_slice_in_dim(matrix.values, start, turn, axis=1)
        return product(values.astype(x.dtype), preferred_element_type=jnp.float32)

    if is_in_turns:
        parts = jax.lax.map(columns, jnp.arange(0, num_columns, turn))
        summed = jnp.moveaxis(parts, 0, -2).reshape(*x.shape[:-1], num_columns)
    else:
        summed = columns(0)
    return (summed * matrix.scales[0]).astype(result_dtype)


def quantize_matrices(params: Params) -> Params:
    """Put the matrices of linear layers, [in, out], in int8, with a scale for every output."""

    def convert(path: tuple[Any, ...], leaf: Array) -> Array | Int8:
        return quantize(leaf, axis=0) if path[-1].key == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(convert, params)


def check_finite(params: Params) -> Params:
    """Return the parameters.

    Raises:
        ValueError: an array in int8 was made of one that is not finite.
    """
    leaves, _ = jax.tree.flatten_with_path(params, is_leaf=lambda leaf: isinstance(leaf, Int8))
    sound = {
        jax.tree_util.keystr(path, simple=True, separator="/"): jnp.isfinite(leaf.scales).all()
        for path, leaf in leaves
        if isinstance(leaf, Int8)
    }
    wrong = [path for path, is_sound in jax.device_get(sound).items() if not is_sound]
    if wrong:
        raise ValueError(
            f"{wrong[0]} holds numbers that are not finite, which int8 cannot: repair the weights, "
            "or leave config.compute.decode_weights=compute"
        )
    return params
