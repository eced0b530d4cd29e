"""Mesh layout, the FSDP rule, the table of tensor parallelism, and who loads which pictures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dar_jax.models.dar.llama import LlamaConfig
from dar_jax.models.dar.tokenizer import TokenizerConfig
from dar_jax.nn import layout
from dar_jax.parallel import sharding
from dar_jax.parallel.sharding import MeshConfig
from dar_jax.performance.hlo import HloProgram


def test_one_axis_takes_the_devices_the_others_leave():
    assert dict(sharding.make_mesh(MeshConfig()).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("num_devices", "tensor", "shape"),
    [(1, 1, (1, 1, 1)), (8, 1, (1, 8, 1)), (8, 2, (1, 4, 2)), (6, 1, (3, 2, 1)), (8, 8, (1, 1, 8))],
)
def test_open_mesh_splits_arrays_first(num_devices, tensor, shape):
    config = MeshConfig(data=-1, fsdp=-1, tensor=tensor)
    mesh = sharding.make_mesh(config, jax.devices()[:num_devices])
    assert tuple(mesh.shape.values()) == shape


def test_open_mesh_splits_arrays_over_few_devices_of_a_slice(monkeypatch):
    monkeypatch.setattr(sharding, "MAX_FSDP", 4)
    mesh = sharding.make_mesh(MeshConfig(data=-1, fsdp=-1))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    mesh = sharding.make_mesh(MeshConfig(data=-1, fsdp=-1, tensor=2, dcn_data=2), TWO_SLICES)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    "config",
    [MeshConfig(data=3), MeshConfig(data=3, fsdp=-1), MeshConfig(data=-1, fsdp=1, tensor=-1)],
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


@dataclasses.dataclass(frozen=True)
class Device:
    """What the mesh asks a device."""

    id: int
    process_index: int = 0
    slice_index: int = 0
    platform: str = "cpu"
    device_kind: str = "made up"


TWO_SLICES = [Device(index, slice_index=index % 2) for index in range(8)]


def test_only_data_crosses_slices():
    mesh = sharding.make_mesh(MeshConfig(data=4, tensor=2, dcn_data=2), TWO_SLICES)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    np.testing.assert_array_equal(slices[:, 0, 0], [0, 0, 1, 1])
    np.testing.assert_array_equal(slices[..., 0], slices[..., 1])


@pytest.mark.parametrize(
    ("config", "platform", "message"),
    [
        (
            MeshConfig(dcn_data=4),
            "cpu",
            "dcn_data 4: the devices form 2 slices; set mesh.dcn_data=2",
        ),
        (
            MeshConfig(data=1, fsdp=8, dcn_data=2),
            "cpu",
            "mesh.data 1 is not a multiple of mesh.dcn",
        ),
        (MeshConfig(), "tpu", "dcn_data 1: the devices form 2 slices"),
    ],
)
def test_mesh_that_does_not_fit_the_slices_is_refused(config, platform, message):
    devices = [dataclasses.replace(device, platform=platform) for device in TWO_SLICES]
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(config, devices)


@pytest.mark.parametrize(
    ("name", "shape", "spec"),
    [
        ("blocks/attention/q/kernel", (2, 256, 128), P(None, "fsdp", "tensor")),
        ("blocks/attention/q/bias", (2, 128), P(None, "tensor")),
        ("blocks/cross_attention/out/kernel", (2, 256, 128), P(None, "tensor", "fsdp")),
        ("blocks/attention/out/bias", (2, 128), P(None, None)),
        ("blocks/attention/q_norm/scale", (2, 64), P(None, None)),
        ("blocks/ffn/gate/kernel", (2, 128, 512), P(None, "fsdp", "tensor")),
        ("blocks/mlp/down/kernel", (2, 512, 128), P(None, "tensor", "fsdp")),
        ("blocks/modulation/kernel", (2, 128, 768), P(None, None, "fsdp")),
        ("token_embed/embedding", (1024, 64), P("tensor", "fsdp")),
        ("condition_embed/embedding", (1024, 64), P("fsdp", None)),
        ("output/kernel", (64, 1024), P("fsdp", "tensor")),
    ],
)
def test_tensor_splits_heads_hidden_units_and_vocabulary(name, shape, spec):
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    tree = {"opt_state": {f"model/{name}": jax.ShapeDtypeStruct(shape, jnp.float32)}}
    assert jax.tree.leaves(sharding.fsdp_sharding(tree, mesh))[0].spec == spec


def test_tensor_that_does_not_divide_an_axis_is_refused():
    mesh = sharding.make_mesh(MeshConfig(data=2, tensor=4))
    tree = {"ffn": {"up": {"kernel": jax.ShapeDtypeStruct((8, 90), jnp.float32)}}}
    with pytest.raises(ValueError, match="tensor 4 does not divide axis 1 of ffn/up/kernel .* 90"):
        sharding.fsdp_sharding(tree, mesh)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LlamaConfig(num_heads=4, num_kv_heads=2), None),
        (LlamaConfig(num_heads=6, dim=768), "tensor 4 does not divide the 6 heads of model.num_h"),
        (LlamaConfig(num_heads=4, num_kv_heads=2), "the 2 heads of model.num_kv_heads"),
        (TokenizerConfig(), None),
        (
            TokenizerConfig(decoder=dataclasses.replace(TokenizerConfig().decoder, dim=192)),
            "the 3 heads of model.decoder",
        ),
    ],
)
def test_tensor_has_to_divide_the_heads(config, message):
    tensor = 2 if message is None else 4
    mesh = sharding.make_mesh(MeshConfig(tensor=tensor))
    if message is None:
        sharding.check_heads(dataclasses.asdict(config), mesh)
        return
    with pytest.raises(ValueError, match=message):
        sharding.check_heads(dataclasses.asdict(config), mesh)


@pytest.mark.parametrize(
    ("mesh", "per_process", "parts"),
    [
        (MeshConfig(data=8), 2, [0, 1, 2, 3]),
        (MeshConfig(data=2, tensor=4), 2, [0, 0, 1, 1]),
        (MeshConfig(data=1, tensor=8), 2, [0, 0, 0, 0]),
        (MeshConfig(data=4, tensor=2), 4, [0, 1]),
    ],
)
def test_processes_of_one_tensor_group_load_the_same_pictures(
    monkeypatch, mesh, per_process, parts
):
    devices = [Device(index, process_index=index // per_process) for index in range(8)]
    found = []
    for process in range(len(parts)):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        found.append(sharding.batch_part(sharding.make_mesh(mesh, devices)))
    assert found == [(part, max(parts) + 1) for part in parts]


def test_uneven_sharing_of_pictures_is_refused():
    devices = [Device(index, process_index=index // 3) for index in range(6)]
    with pytest.raises(ValueError, match="shares pictures unevenly"):
        sharding.batch_part(sharding.make_mesh(MeshConfig(data=3, tensor=2), devices))


def test_fetch_inverts_put():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    tree = {"kernel": np.arange(2**15, dtype=np.float32).reshape(128, -1), "scale": np.ones(())}
    placed = sharding.put(tree, mesh)
    assert placed["kernel"].addressable_shards[0].data.shape == (128, 64)
    jax.tree.map(np.testing.assert_array_equal, sharding.fetch(placed, mesh), tree)


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


@pytest.mark.parametrize(("stacked_dtype", "gathers"), [(None, 2), (jnp.float32, 1)])
def test_blocks_are_gathered_in_each_pass_or_once(stacked_dtype, gathers):
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8))
    kernel = jax.ShapeDtypeStruct((4, 128, 128), jnp.float32)
    params = {"blocks": {"kernel": kernel}}
    where = sharding.fsdp_sharding(params, mesh)
    batch = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=sharding.batch_sharding(mesh))

    def loss(params, x):
        kernels = sharding.gather(params, mesh, stacked_dtype=stacked_dtype)["blocks"]["kernel"]

        def layer(x, kernel):
            return jnp.tanh(layout.keep_batch_split(x) @ kernel), None

        with layout.batch_split(batch.sharding):
            return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, kernels)[0])

    gradient = jax.jit(jax.grad(loss), in_shardings=(where, batch.sharding), out_shardings=where)
    collectives = HloProgram(gradient.lower(params, batch).compile().as_text(), 8).collectives()
    received = sum(each.bytes for each in collectives if each.kind == "all-gather")
    assert received == gathers * kernel.size * 4 * 7 / 8


def test_unknown_gathering_is_refused():
    with pytest.raises(ValueError, match="mesh.gather 'once' must be one of layer, step"):
        MeshConfig(gather="once")
