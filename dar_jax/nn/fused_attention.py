"""Attention kernels that never hold the weights [B, heads, N, M], and the choice between them.

- `cudnn`: of NVIDIA GPUs, by `jax.nn.dot_product_attention`.
- `splash`: of TPUs, a Pallas kernel of JAX.
- `xla`: two products and a softmax, which every device, dtype, mask and dropout can have; it stands
  in `nn.attention`.

Deviation: `splash` scales the queries in float32 and rounds them once more, unless head_dim is a
power of 4; einsum and cuDNN scale the scores.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Protocol

import einops
import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import PartitionSpec

from dar_jax.common.typing import Array, Bool, Float
from dar_jax.nn.compute import Compute
from dar_jax.nn.layout import batch_sharding
from dar_jax.nn.target import traced_devices

TPU_LANES = 128
"""Lengths that `splash` takes are multiples of this."""
TPU_BLOCKS = (512, 256, TPU_LANES)
CUDNN_HEAD_DIMS = range(8, 129, 8)
CUDNN_CAPABILITY = 8.0
"""Ampere; older GPUs have no flash attention."""
RESULTS = "attention"
"""Name of what the backward pass of `splash` needs besides its inputs."""
MIN_LENGTH = 32
"""Of queries and keys, for `auto`: with fewer, einsum's weights are small."""


class Kernel(Protocol):
    """Attention of [B, heads, N, head_dim], to all keys or to those that are not later."""

    def __call__(self, q: Array, k: Array, v: Array, *, causal: bool) -> Array: ...


@dataclasses.dataclass(frozen=True)
class Causal:
    """A mask by rule: keys that are not later than the query are seen, and the first `prefix`.

    The last query sits at the last key.
    """

    prefix: int = 0

    def array(self, num_queries: int, num_keys: int) -> Bool[Array, "N M"]:
        """True may attend."""
        mask = jnp.tri(num_queries, num_keys, num_keys - num_queries, dtype=bool)
        return mask | (jnp.arange(num_keys) < self.prefix) if self.prefix else mask


def check_device(compute: Compute, devices: Sequence[Any]) -> None:
    """Raise ValueError if `compute` names a kernel that no call could use."""
    wanted, device = compute.attention, devices[0]
    if compute.decoding == "pallas":
        fits = _native(device) == "cudnn" and len(devices) == 1 and compute.dtype == "bfloat16"
        if not fits:
            raise ValueError(
                "config.compute.decoding=pallas needs one NVIDIA GPU from Ampere on and "
                f"config.compute.dtype=bfloat16; this is {compute.dtype} on {len(devices)} of "
                f"{device.device_kind}; use xla"
            )
    needs = {"cudnn": "an NVIDIA GPU from Ampere on", "splash": "a TPU"}.get(wanted)
    if needs is None:
        return
    if _native(device) != wanted:
        raise ValueError(
            f"config.compute.attention={wanted} needs {needs}, and this is {device.device_kind}; "
            "use auto"
        )
    if compute.dtype == "float32":
        raise ValueError(
            f"config.compute.attention={wanted} needs config.compute.dtype=bfloat16; use auto, or "
            "xla for float32"
        )


def choose(
    wanted: str,
    q: Float[Array, "B heads N head_dim"],
    k: Float[Array, "B kv_heads M head_dim"],
    mask: Bool[Array, "..."] | Causal | None,
    *,
    drops_weights: bool,
) -> str:
    """Return what computes a call: `xla`, `cudnn` or `splash`; what is new is logged.

    Args:
        wanted: `Compute.attention`. What a named kernel cannot compute, `xla` does.
        q: queries.
        k: keys.
        mask: who may attend.
        drops_weights: attention weights are dropped out.
    """
    devices = traced_devices()
    kernel = _native(devices[0]) if wanted == "auto" else wanted
    lengths = {q.shape[2], k.shape[2]}
    on_one_device = batch_sharding() is not None or len(devices) == 1
    obstacles = {
        "weights are dropped out": drops_weights,
        f"{q.dtype}": q.dtype != jnp.bfloat16,
        "the mask is an array": not (mask is None or isinstance(mask, Causal)),
        "queries and keys differ in number": isinstance(mask, Causal) and len(lengths) > 1,
        "there are few tokens": wanted == "auto" and min(lengths) < MIN_LENGTH,
    }
    if kernel == "cudnn":
        obstacles[f"heads have {q.shape[3]} dims"] = q.shape[3] not in CUDNN_HEAD_DIMS
    if kernel == "splash":
        lengths |= {mask.prefix} if isinstance(mask, Causal) else set()
        odd = any(length % TPU_LANES for length in lengths)
        obstacles[f"lengths are no multiples of {TPU_LANES}"] = odd
        obstacles["devices share the batch"] = not on_one_device
    found = [name for name, present in obstacles.items() if present]
    if kernel == "xla" or found:
        _log("xla", found[0] if kernel != "xla" else devices[0].platform)
        return "xla"
    _log(kernel, devices[0].device_kind)
    return kernel


def fused_attention(
    kernel: str,
    q: Float[Array, "B heads N head_dim"],
    k: Float[Array, "B kv_heads M head_dim"],
    v: Float[Array, "B kv_heads M head_dim"],
    mask: Causal | None,
    *,
    interpret: bool = False,
) -> Float[Array, "B heads N head_dim"]:
    """Compute a call by `cudnn` or `splash`.

    Args:
        kernel: as `choose` returned it.
        q: queries.
        k: keys.
        v: values.
        mask: who may attend.
        interpret: run the TPU's kernel on any device, slowly.
    """
    run: Kernel = _cudnn if kernel == "cudnn" else functools.partial(_splash, interpret=interpret)
    out = run(q, k, v, causal=mask is not None)
    if mask is None or not mask.prefix:
        return out
    # No flag says this of a prefix: its queries see all of it, the others are as causal has them.
    prefix = run(*(x[:, :, : mask.prefix] for x in (q, k, v)), causal=False)
    return jnp.concatenate([prefix, out[:, :, mask.prefix :]], axis=2)


def are_results(primitive: Any, *_: Any, **params: Any) -> bool:
    """Checkpoint policy: keep the results of the kernels, which take two products to compute."""
    if primitive.name == "name":
        return params["name"] == RESULTS
    return primitive.name.startswith("dot_product_attention_fwd")  # cuDNN's


def _native(device: Any) -> str:
    """The kernel of a device."""
    if device.platform == "tpu":
        return "splash"
    if device.platform in ("gpu", "cuda"):
        try:  # AMD's are names
            capability = float(device.compute_capability)
        except (AttributeError, ValueError):
            capability = 0.0
        return "cudnn" if capability >= CUDNN_CAPABILITY else "xla"
    return "xla"


@functools.cache
def _log(kernel: str, why: str) -> None:
    """Log once."""
    logging.info("Attention: %s (%s)", kernel, why)


def _cudnn(q: Array, k: Array, v: Array, *, causal: bool) -> Array:
    q, k, v = (einops.rearrange(x, "b heads n d -> b n heads d") for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    return einops.rearrange(out, "b n heads d -> b heads n d")


def _splash(q: Array, k: Array, v: Array, *, causal: bool, interpret: bool) -> Array:
    # Takes a second, which only TPUs need to spend.
    from jax.experimental.pallas.ops.tpu import splash_attention

    lengths = (q.shape[2], k.shape[2])
    block_q, block_kv = (next(b for b in TPU_BLOCKS if length % b == 0) for length in lengths)
    blocks = splash_attention.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        use_fused_bwd_kernel=True,
    )
    mask = splash_attention.CausalMask(lengths) if causal else splash_attention.FullMask(lengths)

    def of_device(q: Array, k: Array, v: Array) -> Array:
        kernel = splash_attention.make_splash_mha(
            splash_attention.MultiHeadMask([mask] * q.shape[1]),
            block_sizes=blocks,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=RESULTS,
            interpret=interpret,
        )
        scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
        # TPU's compiler refuses products of bfloat16 that are to be more precise than that.
        with jax.default_matmul_precision("default"):
            attended: Any = jax.vmap(kernel)(scaled, k, v)
        return attended

    return _split(of_device, num_kv_heads=k.shape[1])(q, k, v)


def _split(function: Any, *, num_kv_heads: int) -> Any:
    """Run on each device with its rows and heads: a Pallas kernel is not split by the compiler."""
    where = batch_sharding()
    if where is None:
        return function
    (rows,), mesh = where.spec, where.mesh
    heads = tuple(axis for axis in mesh.axis_names if axis not in rows)
    divides = num_kv_heads % math.prod(mesh.shape[axis] for axis in heads) == 0
    spec = PartitionSpec(rows, heads if divides else None)
    return jax.shard_map(function, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
