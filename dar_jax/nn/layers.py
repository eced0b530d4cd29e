"""Norms, MLPs and dropout."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from dar_jax.common.typing import Any, Array, Bool, Float, PRNGKeyArray
from dar_jax.nn.compute import Compute
from dar_jax.nn.layout import batch_sharding
from dar_jax.nn.linear import Linear
from dar_jax.nn.target import traced_devices

LAYER_NORM_EPSILON = 1e-6
REFERENCE_STD, REFERENCE_WIDTH = 0.02, 768
XAVIER_INIT = nnx.initializers.xavier_uniform()
FUSED_QKV_INIT = nnx.initializers.variance_scaling(0.5, "fan_avg", "uniform")
"""Xavier's for queries, keys and values drawn as one matrix [3 D, D]."""
FRAMEWORK_INIT = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""PyTorch's default for linear layers, U(+-1/sqrt(fan_in)), where the reference leaves it. Of a
`linear` it draws the bias too."""


def block_init(rng: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Draw a kernel [in, out]: normal with the reference's std of 0.02 from its width on, 768.

    The reference truncates at 2, not at two standard deviations, which is at a hundred of them.

    The std grows as the width falls, so that narrow models start with outputs of the same size;
    at 0.02, a block of width 128 would start a dozen times weaker.
    """
    stddev = REFERENCE_STD * (REFERENCE_WIDTH / min(REFERENCE_WIDTH, *shape)) ** 0.5
    return nnx.initializers.normal(stddev)(rng, shape, dtype)


@functools.cache  # modules with the same initialiser are equal
def framework_bias(fan_in: int) -> Callable[..., Array]:
    """Return PyTorch's default initialiser of biases, U(+-1/sqrt(fan_in))."""
    limit = fan_in**-0.5

    def init(rng: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        return jax.random.uniform(rng, shape, dtype, minval=-limit, maxval=limit)

    return init


def linear(
    in_features: int,
    out_features: int,
    *,
    compute: Compute,
    rngs: nnx.Rngs,
    use_bias: bool = True,
    kernel_init: Callable = block_init,
    result_dtype: DTypeLike | None = None,
) -> Linear:
    """A linear layer in the compute dtype; the bias starts at zero, or as the framework's.

    Its result has the compute dtype too, or another one that is not rounded to it first.
    """
    from_framework = kernel_init is FRAMEWORK_INIT
    return Linear(
        in_features,
        out_features,
        use_bias=use_bias,
        kernel_init=kernel_init,
        bias_init=framework_bias(in_features) if from_framework else nnx.initializers.zeros,
        dtype=compute.jnp_dtype,
        result_dtype=result_dtype,
        rngs=rngs,
    )


def affine_layer_norm(dim: int, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer norm with scale and bias, float32 whatever comes in; see `layer_norm`."""
    return nnx.LayerNorm(
        dim,
        epsilon=LAYER_NORM_EPSILON,
        dtype=jnp.float32,
        use_fast_variance=False,  # E[x^2] - E[x]^2 loses what parity needs
        rngs=rngs,
    )


def layer_norm(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """Parameter-free layer norm, float32 whatever comes in.

    What follows is scaled, shifted or rotated in float32 and rounded once, by a linear layer.
    """
    centred = x.astype(jnp.float32)
    centred -= jnp.mean(centred, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON)


def rms_norm(dim: int, *, epsilon: float, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Root-mean-square norm with scale, float32 whatever comes in."""
    return nnx.RMSNorm(dim, epsilon=epsilon, dtype=jnp.float32, rngs=rngs)


def silu(x: Array) -> Array:
    """SiLU, computed in float32 and rounded once, as PyTorch does."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


def dropout(x: Array, rate: float, rng: PRNGKeyArray | None) -> Array:
    """Dropout with an explicit key; no key means evaluation."""
    if rng is None or rate == 0.0:
        return x
    kept = 1.0 - rate
    return jnp.where(_kept(rng, kept, x.shape), x / kept, 0)


def _kept(rng: PRNGKeyArray, share: float, shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """Draw which elements of a batch stay.

    Accelerators draw with their own generator, which costs a fraction, and every device for its
    rows alone: XLA cannot split that generator and would have all of them draw for all rows. What
    is drawn depends on the key alone, so that what resumes draws the same; but, unlike that of
    CPUs, also on the kind of device and on how it shares the batch.
    """
    if traced_devices()[0].platform == "cpu":
        return jax.random.bernoulli(rng, share, shape)
    data, where = jax.random.key_data(rng), batch_sharding()

    def draw(data: Array, shape: tuple[int, ...]) -> Array:
        seed = jnp.concatenate([data, data])  # as JAX does
        return jax.random.bernoulli(jax.random.wrap_key_data(seed, impl="rbg"), share, shape)

    if where is None:
        return draw(data, shape)
    (rows,), mesh = where.spec, where.mesh
    num_parts = math.prod(mesh.shape[axis] for axis in rows)
    if shape[0] % num_parts:
        return draw(data, shape)

    def of_device(data: Array) -> Array:
        # Another key, not another place of its sequence, which the others go through too.
        part = jax.lax.axis_index(rows).astype(data.dtype)
        return draw(data.at[0].add(part), (shape[0] // num_parts, *shape[1:]))

    split = PartitionSpec(rows)
    return jax.shard_map(
        of_device, mesh=mesh, in_specs=PartitionSpec(), out_specs=split, check_vma=False
    )(data)


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
        activation: Callable[[Array], Array] = silu,
        kernel_init: Callable = block_init,
        dropout_rate: float = 0.0,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.dropout_rate = dropout_rate
        options: dict[str, Any] = dict(kernel_init=kernel_init, compute=compute, rngs=rngs)
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
        def projection(features_in: int, features_out: int) -> Linear:
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
        return self.down(silu(self.gate(x)) * self.up(x))
