"""Device mesh and sharding by rule: models do not know about meshes.

The mesh has three axes. A batch is split over `data` and `fsdp`; every large array of the train
state is split over `fsdp` along its largest divisible axis (fully sharded data parallelism: XLA
gathers a layer's weights where they are used and scatters their gradients). `tensor` is kept at
the end of the mesh, where neighbouring devices share the fastest links.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dar_jax.common.typing import Array

BATCH_AXES = ("data", "fsdp")
STACKED_NAME = "blocks"
"""Leaves below this name carry one extra leading axis: the layer."""
MIN_SHARDED_SIZE = 2**14
"""Arrays with fewer elements (64 KiB of float32) stay replicated: gathering them costs more
latency than their copies cost memory."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; one axis may be -1 and takes the devices that the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lay `devices` (default: all) out as the mesh (data, fsdp, tensor).

    Raises:
        ValueError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    axes = dataclasses.asdict(config)
    shape = list(axes.values())
    if shape.count(-1) == 1:
        shape[shape.index(-1)] = len(devices) // abs(math.prod(shape))
    if min(shape) < 1 or math.prod(shape) != len(devices):
        raise ValueError(
            f"mesh {axes} does not multiply to the {len(devices)} devices present; "
            "set one axis to -1 to take what the others leave"
        )
    auto = (AxisType.Auto,) * len(shape)
    return jax.make_mesh(tuple(shape), tuple(axes), axis_types=auto, devices=devices)


def layer_axes(path: Sequence[Any]) -> int:
    """Number of leading layer axes (0 or 1) of the leaf at a key path of a parameter tree."""
    return int(STACKED_NAME in jax.tree_util.keystr(path, simple=True, separator="/").split("/"))


def fsdp_sharding(tree: Any, mesh: Mesh) -> Any:
    """Return the `NamedSharding` of every leaf of a tree of (possibly abstract) arrays.

    The largest axis that `fsdp` divides is split, the last one of several equals. The layer axis
    of stacked blocks is left alone: the scan over layers slices it.
    """

    def rule(path: Sequence[Any], leaf: Any) -> NamedSharding:
        spec = [None] * len(leaf.shape)
        axes = range(layer_axes(path), len(leaf.shape))
        divisible = [axis for axis in axes if leaf.shape[axis] % mesh.shape["fsdp"] == 0]
        if divisible and math.prod(leaf.shape) >= MIN_SHARDED_SIZE:
            spec[max(divisible, key=lambda axis: (leaf.shape[axis], axis))] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(rule, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: its leading axis over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raise ValueError unless the global batch divides over the data-parallel devices."""
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % shards:
        raise ValueError(
            f"batch_size {batch_size} does not divide over {shards} data-parallel devices "
            f"(mesh {dict(mesh.shape)}); use a multiple of {shards}"
        )


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """Assemble the global batch from this process's part of it."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh), batch)
