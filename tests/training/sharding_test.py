"""Mesh layout and the FSDP rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dar_jax.training import sharding
from dar_jax.training.sharding import MeshConfig


def test_one_axis_takes_the_devices_the_others_leave():
    assert dict(sharding.make_mesh(MeshConfig()).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    "config", [MeshConfig(data=3), MeshConfig(data=3, fsdp=-1), MeshConfig(data=-1, fsdp=-1)]
)
def test_mesh_that_does_not_fill_the_devices_is_refused(config):
    with pytest.raises(ValueError, match="does not multiply to the 8 devices"):
        sharding.make_mesh(config)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("head", (256, 512), P(None, "fsdp")),
        ("head", (512, 256), P("fsdp", None)),
        ("head", (256, 256), P(None, "fsdp")),
        ("head", (255, 256), P(None, "fsdp")),
        ("head", (255, 257), P(None, None)),
        ("head", (8, 8), P(None, None)),
        ("head", (1024, 128, 64), P("fsdp", None, None)),
        ("blocks", (1024, 128, 64), P(None, "fsdp", None)),
        ("blocks", (1024, 255), P(None, None)),
    ],
)
def test_fsdp_splits_the_largest_divisible_axis_but_not_layers(path, shape, spec):
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    tree = {"model": {path: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}}}
    assert sharding.fsdp_sharding(tree, mesh)["model"][path]["kernel"].spec == spec


def test_batch_is_split_over_data_and_fsdp():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    pixels = np.arange(16, dtype=np.uint8)
    batch = sharding.put_batch({"pixels": pixels}, mesh)
    assert batch["pixels"].sharding.shard_shape((16,)) == (4,)
    np.testing.assert_array_equal(batch["pixels"], pixels)


def test_batch_that_does_not_divide_over_the_devices_is_refused():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    sharding.check_batch_size(16, mesh)
    with pytest.raises(ValueError, match="batch_size 12 .* use a multiple of 8"):
        sharding.check_batch_size(12, mesh)
