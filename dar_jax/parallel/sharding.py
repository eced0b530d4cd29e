"""Device mesh and sharding by rule: models do not know about meshes.

The mesh has three axes. A batch is split over `data` and `fsdp`. Every large array of the train
state is split over `fsdp` along its largest divisible axis (fully sharded data parallelism: XLA
gathers a layer's weights where they are used and scatters their gradients). `tensor` splits the
work inside a layer as Megatron does (arXiv:1909.08053): heads, hidden units and vocabulary; it is
the last axis of the mesh, where neighbouring devices share the fastest links. Where several slices
are joined by a slower network, `data` is the axis that crosses it.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dar_jax.common.typing import Array

BATCH_AXES = ("data", "fsdp")
TENSOR_AXES = (
    (r"attention/[qkv]/(kernel|bias)", -1),  # heads
    (r"attention/out/kernel", -2),
    (r"\b(gate|up)/(kernel|bias)", -1),  # hidden units of an MLP
    (r"\bdown/kernel", -2),
    (r"\btoken_embed/embedding", -2),  # vocabulary
    (r"\boutput/kernel", -1),
)
"""Ends of leaf names, and the axis that `tensor` splits. The first product of each pair makes its
part of the heads or units from the whole width, the second sums the parts: one all-reduce. What is
not listed is the same on all devices of a `tensor` group; for adaptive norms that is cheaper than
moving six modulations of every token."""
STACKED_NAME = "blocks"
"""Leaves below this name carry one extra leading axis: the layer."""
MAX_FSDP = 32
"""Devices that an array is split over where the mesh is left open. Parts for 256 are narrower
than a tile of a TPU's memory (D-AR-XL: 5 of 1280 rows, a tile has 8). Its compiler then gathers by
summing up whole arrays that are zero but for one part, which is twice the bytes."""
GATHERS = ("layer", "step")
REDUCE_DTYPES = ("float32", "bfloat16")
MIN_SHARDED_SIZE = 2**14
"""Arrays with fewer elements (64 KiB of float32) stay replicated: gathering them costs more
latency than their copies cost memory."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; one axis may be -1 and takes the devices that the others leave.

    If `data` and `fsdp` both are, `fsdp` takes as many as divide `MAX_FSDP`, within a slice.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    dcn_data: int = 1
    """Slices that `data` spans, if a slower network joins several; part of `data`."""
    gather: str = "layer"
    """What `fsdp` splits is gathered for each `layer`, forwards and backwards, or once a `step` in
    the compute dtype, which sends half and holds all weights and their gradients at a time. With
    accumulation that is once per microbatch."""
    reduce_dtype: str = "float32"
    """Gradients are summed over devices in float32, as the references' are; in bfloat16 they send
    half, and a sum over 256 devices is 1.5 to 2 % off instead of 0.1 %."""

    def __post_init__(self):
        for name in ("data", "fsdp", "tensor", "dcn_data"):
            size = getattr(self, name)
            if not (size >= 1 or (size == -1 and name != "dcn_data")):
                raise ValueError(f"mesh.{name} {size} must be a number of devices, or -1: the rest")
        if self.reduce_dtype not in REDUCE_DTYPES:
            raise ValueError(
                f"mesh.reduce_dtype {self.reduce_dtype!r} must be one of {', '.join(REDUCE_DTYPES)}"
            )
        if self.gather not in GATHERS:
            raise ValueError(f"mesh.gather {self.gather!r} must be one of {', '.join(GATHERS)}")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Lay `devices` (default: all; or those of a topology) out as the mesh (data, fsdp, tensor).

    Raises:
        ValueError: the axes do not multiply to the number of devices, or the slices are not those
            that the devices have.
    """
    devices = jax.devices() if devices is None else devices
    axes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    shape = list(axes.values())
    if (config.data, config.fsdp) == (-1, -1):
        outside = max(config.tensor * config.dcn_data, 1)
        shape[1] = math.gcd(MAX_FSDP, len(devices) // outside)
    if shape.count(-1) == 1:
        shape[shape.index(-1)] = len(devices) // abs(math.prod(shape))
    if min(shape) < 1 or math.prod(shape) != len(devices):
        raise ValueError(
            f"mesh {axes} does not multiply to the {len(devices)} devices present; "
            "set one axis to -1 to take what the others leave"
        )
    if _check_slices(config, devices) == 1:
        # An axis of the mesh may need half of a torus axis: 32 of 4x4x4 devices.
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        array = _hybrid_array(shape, config.dcn_data, devices)
    return Mesh(array, tuple(axes), axis_types=(AxisType.Auto,) * len(shape))


def _check_slices(config: MeshConfig, devices: Sequence[Any]) -> int:
    present = len({getattr(device, "slice_index", 0) for device in devices})
    # Other platforms number hosts as slices, whose network may be fast enough for every axis.
    if config.dcn_data != present and (config.dcn_data != 1 or devices[0].platform == "tpu"):
        raise ValueError(
            f"mesh.dcn_data {config.dcn_data}: the devices form {present} slices; "
            f"set mesh.dcn_data={present}"
        )
    return config.dcn_data


def _hybrid_array(shape: Sequence[int], num_slices: int, devices: Sequence[Any]) -> np.ndarray:
    """Arrange the devices of several slices so that only `data` crosses from one to another."""
    data, *inner = shape
    if data % num_slices:
        raise ValueError(
            f"mesh.data {data} is not a multiple of mesh.dcn_data {num_slices}; "
            "only data parallelism crosses slices"
        )
    within, across = (data // num_slices, *inner), (num_slices, *(1 for _ in inner))
    return mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
    )


def layer_axes(path: tuple[Any, ...]) -> int:
    """Number of leading layer axes (0 or 1) of the leaf at a key path of a parameter tree."""
    return int(STACKED_NAME in leaf_name(path).split("/"))


def fsdp_sharding(tree: Any, mesh: Mesh) -> Any:
    """Return the `NamedSharding` of every leaf of a tree of (possibly abstract) arrays.

    `tensor` splits the axis that `TENSOR_AXES` names. Of the others, the largest axis that `fsdp`
    divides is split over it, the last one of several equals. The layer axis of stacked blocks is
    left alone: the scan over layers slices it.

    Raises:
        ValueError: `tensor` does not divide an axis that it has to split.
    """

    def rule(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        spec: list[str | None] = [None] * len(leaf.shape)
        axis = _tensor_axis(leaf_name(path)) if mesh.shape["tensor"] > 1 else None
        if axis is not None:
            _check_tensor_divides(leaf_name(path), leaf.shape, axis, mesh)
            spec[axis] = "tensor"
        axes = range(layer_axes(path), len(leaf.shape))
        free = [axis for axis in axes if spec[axis] is None]
        divisible = [axis for axis in free if leaf.shape[axis] % mesh.shape["fsdp"] == 0]
        if divisible and math.prod(leaf.shape) >= MIN_SHARDED_SIZE:
            spec[max(divisible, key=lambda axis: (leaf.shape[axis], axis))] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(rule, tree)


def leaf_name(path: tuple[Any, ...]) -> str:
    """Name of the leaf at a key path: "encoder/blocks/mlp/up/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _tensor_axis(name: str) -> int | None:
    return next((axis for end, axis in TENSOR_AXES if re.search(f"{end}$", name)), None)


def _check_tensor_divides(name: str, shape: Sequence[int], axis: int, mesh: Mesh) -> None:
    if shape[axis] % mesh.shape["tensor"]:
        raise ValueError(
            f"mesh.tensor {mesh.shape['tensor']} does not divide axis {len(shape) + axis} of "
            f"{name} {tuple(shape)}; use a divisor of {shape[axis]}"
        )


def check_heads(model_config: Mapping[str, Any], mesh: Mesh) -> None:
    """Raise ValueError unless `tensor` divides all numbers of attention heads of a model.

    Args:
        model_config: the architecture as the task gives it. A block has heads if it says
            `num_heads`, or `dim` and `head_dim`.
        mesh: the mesh.
    """
    for name, heads in _heads(model_config, "model"):
        if heads % mesh.shape["tensor"]:
            raise ValueError(
                f"mesh.tensor {mesh.shape['tensor']} does not divide the {heads} heads of {name}; "
                f"use a divisor of {heads}"
            )


def _heads(block: Mapping[str, Any], where: str) -> Iterator[tuple[str, int]]:
    for key in ("num_heads", "num_kv_heads"):
        if block.get(key):
            yield f"{where}.{key}", block[key]
    if block.get("dim") and block.get("head_dim"):
        yield where, block["dim"] // block["head_dim"]
    for key, value in block.items():
        if isinstance(value, Mapping):
            yield from _heads(value, f"{where}.{key}")


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: its leading axis over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def num_batch_shards(mesh: Mesh | None) -> int:
    """Devices that a batch is split over."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raise ValueError unless the global batch divides over the data-parallel devices."""
    shards = num_batch_shards(mesh)
    if batch_size % shards:
        raise ValueError(
            f"batch_size {batch_size} does not divide over {shards} data-parallel devices "
            f"(mesh {dict(mesh.shape)}); use a multiple of {shards}"
        )


def batch_part(mesh: Mesh) -> tuple[int, int]:
    """Return which part of every global batch this process loads: (index, number of parts).

    Processes whose devices hold the same pictures, being in one `tensor` group, load the same part.

    Raises:
        ValueError: the parts of two processes overlap without being equal.
    """
    width = mesh.shape["fsdp"]
    rows = {}
    for (data, fsdp, _), device in np.ndenumerate(mesh.devices):
        rows.setdefault(device.process_index, set()).add(data * width + fsdp)
    parts = sorted({tuple(sorted(held)) for held in rows.values()})
    if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) != len(set().union(*parts)):
        raise ValueError(
            f"mesh {dict(mesh.shape)} shares pictures unevenly between processes; use a "
            "mesh.tensor that divides the devices of a process, or is a multiple of them"
        )
    return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """Assemble the global batch from this process's part of it."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh), batch)


def put(tree: Any, mesh: Mesh) -> Any:
    """Put arrays that every process holds on the mesh, each device its part by the rule."""

    def put_leaf(leaf: Any, where: NamedSharding) -> Array:
        return jax.make_array_from_callback(leaf.shape, where, lambda index: leaf[index])

    return jax.tree.map(put_leaf, tree, fsdp_sharding(tree, mesh))


def fetch(tree: Any, mesh: Mesh) -> Any:
    """Return every leaf whole, in NumPy on every process; one at a time is on the devices."""
    whole = replicated(mesh)
    return jax.tree.map(lambda leaf: np.asarray(jax.device_put(leaf, whole)), tree)


def gather(params: Any, mesh: Mesh, *, stacked_dtype: Any = None) -> Any:
    """Gather, inside a jitted function, what `fsdp` splits of parameters.

    Args:
        params: the parameters.
        mesh: the mesh.
        stacked_dtype: of the gathered kernels of stacked blocks; None leaves the blocks split, and
            the scan over them gathers one layer at a time. For the other parameters the compiler
            has to be told: it would look tokens up in each part of an embedding and add up the
            results.
    """

    def rule(path: tuple[Any, ...], leaf: Array, where: NamedSharding) -> Array:
        if layer_axes(path):
            if stacked_dtype is None:
                return leaf
            if leaf_name(path).endswith("kernel"):
                # Cast in parts, and kept from being cast after the gathering.
                leaf = jax.lax.with_sharding_constraint(leaf.astype(stacked_dtype), where)
        spec = (None if axis == "fsdp" else axis for axis in where.spec)
        return _reshard(leaf, where, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree_util.tree_map_with_path(rule, params, fsdp_sharding(params, mesh))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _reshard(x: Array, before: NamedSharding, after: NamedSharding) -> Array:
    """Give x another sharding, and its gradient the one from before, which JAX alone would not:
    gradients would be summed up whole on every device instead of scattered."""
    del before
    return jax.lax.with_sharding_constraint(x, after)


_reshard.defvjp(
    lambda x, before, after: (_reshard(x, before, after), None),
    lambda before, after, _, gradient: (jax.lax.with_sharding_constraint(gradient, before),),
)
