"""Norms, MLPs and dropout."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dar_jax.common.typing import Array, Float, PRNGKeyArray
from dar_jax.nn.compute import Compute

LAYER_NORM_EPSILON = 1e-6
REFERENCE_STD, REFERENCE_WIDTH = 0.02, 768
XAVIER_INIT = nnx.initializers.xavier_uniform()
FUSED_QKV_INIT = nnx.initializers.variance_scaling(0.5, "fan_avg", "uniform")
"""Xavier's for queries, keys and values drawn as one matrix [3 D, D]."""
FRAMEWORK_INIT = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""PyTorch's default for linear layers, U(+-1/sqrt(fan_in)), where the reference leaves it."""


def block_init(rng: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Draw a kernel [in, out]: truncated normal with the reference's std of 0.02 at its width, 768.

    The std grows as the width falls, so that narrow models start with outputs of the same size;
    at 0.02, a block of width 128 would start a dozen times weaker.
    """
    stddev = REFERENCE_STD * (REFERENCE_WIDTH / min(shape)) ** 0.5
    return nnx.initializers.truncated_normal(stddev)(rng, shape, dtype)


def linear(
    in_features: int,
    out_features: int,
    *,
    compute: Compute,
    rngs: nnx.Rngs,
    use_bias: bool = True,
    kernel_init: Callable = block_init,
) -> nnx.Linear:
    """A linear layer in the compute dtype; the bias starts at zero."""
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=use_bias,
        dtype=compute.jnp_dtype,
        kernel_init=kernel_init,
        rngs=rngs,
    )


def affine_layer_norm(dim: int, *, compute: Compute, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer norm with scale and bias; statistics in float32."""
    return nnx.LayerNorm(
        dim,
        epsilon=LAYER_NORM_EPSILON,
        dtype=compute.jnp_dtype,
        use_fast_variance=False,  # E[x^2] - E[x]^2 loses what parity needs
        rngs=rngs,
    )


def layer_norm(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """Parameter-free layer norm, computed in float32."""
    centred = x.astype(jnp.float32)
    centred -= jnp.mean(centred, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON)).astype(x.dtype)


def rms_norm(dim: int, *, epsilon: float, compute: Compute, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Root-mean-square norm with scale; statistics in float32."""
    return nnx.RMSNorm(dim, epsilon=epsilon, dtype=compute.jnp_dtype, rngs=rngs)


def dropout(x: Array, rate: float, rng: PRNGKeyArray | None) -> Array:
    """Dropout with an explicit key; no key means evaluation."""
    if rng is None or rate == 0.0:
        return x
    return nnx.Dropout(rate, deterministic=False)(x, rngs=rng)


def split_rng(rng: PRNGKeyArray | None, num: int) -> tuple[PRNGKeyArray | None, ...]:
    """Split a key that may be missing, which means evaluation."""
    return (None,) * num if rng is None else tuple(jax.random.split(rng, num))


class Mlp(nnx.Module):
    """Linear, activation, linear; both with bias, both outputs with dropout."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        out_dim: int | None = None,
        activation: Callable[[Array], Array] = jax.nn.silu,
        kernel_init: Callable = block_init,
        dropout_rate: float = 0.0,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.dropout_rate = dropout_rate
        options = dict(kernel_init=kernel_init, compute=compute, rngs=rngs)
        self.up = linear(dim, hidden_dim, **options)
        self.down = linear(hidden_dim, out_dim or dim, **options)

    def __call__(self, x: Float[Array, "*batch D"], *, rng: PRNGKeyArray | None = None) -> Array:
        """Apply to every token; a key turns dropout on."""
        rng_hidden, rng_out = split_rng(rng, 2)
        hidden = dropout(self.activation(self.up(x)), self.dropout_rate, rng_hidden)
        return dropout(self.down(hidden), self.dropout_rate, rng_out)


class SwiGlu(nnx.Module):
    """`down(silu(gate(x)) * up(x))` without biases (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        compute: Compute,
        rngs: nnx.Rngs,
        kernel_init: Callable = block_init,
    ):
        def projection(features_in: int, features_out: int) -> nnx.Linear:
            return linear(
                features_in,
                features_out,
                use_bias=False,
                kernel_init=kernel_init,
                compute=compute,
                rngs=rngs,
            )

        self.gate = projection(dim, hidden_dim)
        self.up = projection(dim, hidden_dim)
        self.down = projection(hidden_dim, dim)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
