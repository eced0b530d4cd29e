"""Linear layers and convolutions in the compute dtype, whose gradients are summed in float32.

A device's gradient of a kernel is a sum over its part of the batch, and XLA sums the parts over
devices in the dtype in which they come out of the product. With bfloat16 inputs autodiff lets them
come out in bfloat16; here they come out in float32, unless `layout.gradients_summed_in` says
otherwise.

A kernel may have been gathered in the compute dtype from parts of a float32 one (`mesh.gather`).
Then the product reads the gathered kernel and the parts get the gradient, see `Gathered`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from dar_jax.common.typing import Any, Array, Float, Params
from dar_jax.nn.int8 import Int8, matmul
from dar_jax.nn.layout import gradient_dtype

IMAGE_LAYOUT = ("NHWC", "HWIO", "NHWC")
PRODUCT = "product"
"""Name of the results of linear layers, for policies of recomputation: these do not see into layers
that have a gradient of their own."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gathered:
    """A kernel of which a copy in another dtype is at hand: it stands in the kernel's place.

    Attributes:
        whole: the copy, which is read.
        part: the kernel, which gets the gradient.
    """

    whole: Array
    part: Array


def keep_parts(whole: Params, params: Params) -> Params:
    """Let the parameters get the gradients of their copies in other dtypes, in their own."""

    def pair(copy: Array, leaf: Array) -> Array | Gathered:
        return copy if copy.dtype == leaf.dtype else Gathered(jax.lax.stop_gradient(copy), leaf)

    return jax.tree.map(pair, whole, params)


def whole(params: Params) -> Params:
    """Return the copies that are read, without the parameters that get their gradients."""
    return jax.tree.map(
        lambda leaf: leaf.whole if isinstance(leaf, Gathered) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, Gathered),
    )


class Dtypes(NamedTuple):
    """Of the product's inputs, its result, the gradient's sum, and the gradient."""

    compute: Any
    result: Any
    summed: Any
    gradient: Any


class Linear(nnx.Module):
    """`x @ kernel + bias`, kernel [in, out]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool,
        kernel_init: Callable[..., Array],
        bias_init: Callable[..., Array],
        dtype: DTypeLike,
        result_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        self.dtype, self.result_dtype = jnp.dtype(dtype), jnp.dtype(result_dtype or dtype)
        self.kernel = nnx.Param(kernel_init(rngs.params(), (in_features, out_features)))
        self.bias = nnx.Param(bias_init(rngs.params(), (out_features,))) if use_bias else None

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch F"]:
        """Apply to the last axis."""
        if isinstance(kernel := self.kernel.get_value(), Int8):  # is not trained
            product = matmul(x.astype(self.dtype), kernel.read_after(x), jnp.float32)
            product = product if self.bias is None else product + self.bias[...]
            return product.astype(self.result_dtype)
        whole, part = _parts(self.kernel)
        bias = None if self.bias is None else jnp.asarray(self.bias[...])
        dtypes = Dtypes(self.dtype, self.result_dtype, gradient_dtype(), part.dtype)
        return checkpoint_name(_affine(dtypes, x.astype(self.dtype), whole, part, bias), PRODUCT)


class Conv(nnx.Module):
    """Convolution of images, kernel [rows, columns, in, out]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kernel_size: int,
        stride: int,
        padding: Sequence[tuple[int, int]],
        use_bias: bool = True,
        kernel_init: Callable[..., Array],
        bias_init: Callable[..., Array],
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        shape = (kernel_size, kernel_size, in_features, out_features)
        self.dtype = jnp.dtype(dtype)
        self.stride, self.padding = stride, tuple(padding)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape))
        self.bias = nnx.Param(bias_init(rngs.params(), (out_features,))) if use_bias else None

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        whole, part = _parts(self.kernel)
        bias = None if self.bias is None else jnp.asarray(self.bias[...])
        dtypes = Dtypes(self.dtype, self.dtype, gradient_dtype(), part.dtype)
        shape = (self.stride, self.padding)
        return _convolve(dtypes, shape, x.astype(self.dtype), whole, part, bias)


def _parts(kernel: nnx.Param) -> tuple[Array, Array]:
    """Return what is read and what gets the gradient."""
    value = kernel.get_value()
    if isinstance(value, Gathered):
        return value.whole, value.part
    whole = jnp.asarray(value)
    return whole, whole


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _affine(dtypes: Dtypes, x: Array, whole: Array, part: Array, bias: Array | None) -> Array:
    del part
    # With a bias, the sum is what is rounded, once.
    product = jnp.einsum(
        "...i,io->...o",
        x,
        whole.astype(x.dtype),
        preferred_element_type=dtypes.result if bias is None else jnp.float32,
    )
    return product if bias is None else (product + bias).astype(dtypes.result)


def _affine_forward(dtypes, x, whole, part, bias):
    return _affine(dtypes, x, whole, part, bias), (x, whole, bias)


def _affine_backward(dtypes, residuals, gradient):
    x, whole, bias = residuals
    gradient = gradient.astype(x.dtype)
    of_x = jnp.einsum("...o,io->...i", gradient, whole.astype(x.dtype))
    of_kernel = jnp.einsum("...i,...o->io", x, gradient, preferred_element_type=dtypes.summed)
    return of_x, None, of_kernel.astype(dtypes.gradient), _of_bias(dtypes, gradient, bias)


_affine.defvjp(_affine_forward, _affine_backward)


def _of_bias(dtypes: Dtypes, gradient: Array, bias: Array | None) -> Array | None:
    if bias is None:
        return None
    axes = tuple(range(gradient.ndim - 1))
    return jnp.sum(gradient, axes, dtype=dtypes.summed).astype(bias.dtype)


def _image_product(shape: tuple, x: Array, kernel: Array) -> Array:
    stride, padding = shape
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=IMAGE_LAYOUT
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolve(
    dtypes: Dtypes, shape: tuple, x: Array, whole: Array, part: Array, bias: Array | None
) -> Array:
    del part
    product = _image_product(shape, x, whole.astype(x.dtype))
    return product if bias is None else product + bias.astype(product.dtype)


def _convolve_forward(dtypes, shape, x, whole, part, bias):
    return _convolve(dtypes, shape, x, whole, part, bias), (x, whole, bias)


def _convolve_backward(dtypes, shape, residuals, gradient):
    x, whole, bias = residuals
    kernel = whole.astype(x.dtype)
    (of_x,) = jax.linear_transpose(lambda x: _image_product(shape, x, kernel), x)(gradient)
    # A convolution has no result dtype of its own: its inputs are cast, and lose nothing.
    wide = x.astype(dtypes.summed)
    transposed = jax.linear_transpose(
        lambda kernel: _image_product(shape, wide, kernel), whole.astype(dtypes.summed)
    )
    (of_kernel,) = transposed(gradient.astype(dtypes.summed))
    return of_x, None, of_kernel.astype(dtypes.gradient), _of_bias(dtypes, gradient, bias)


_convolve.defvjp(_convolve_forward, _convolve_backward)
