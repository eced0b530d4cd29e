"""Kernels against einsum, values and gradients; which one is chosen, and what cannot be."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dar_jax.nn import fused_attention
from dar_jax.nn.attention import dot_product_attention
from dar_jax.nn.compute import Compute
from dar_jax.nn.fused_attention import Causal, check_device, choose
from dar_jax.nn.layout import batch_split
from dar_jax.nn.target import traced_for
from dar_jax.performance.topologies import find_devices

RTOL = 1e-5  # float32, sums in another order
ROUNDED = 2e-2  # bfloat16 weights, rounded before (einsum) or after (splash) they are normalised
CPU, TPU, AMPERE, VOLTA, AMD = (
    types.SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)
    for platform, kind, capability in [
        ("cpu", "cpu", None),
        ("tpu", "TPU v6 lite", None),
        ("gpu", "NVIDIA A100", "8.0"),
        ("gpu", "Tesla V100", "7.0"),
        ("gpu", "AMD Instinct MI300X", "gfx942"),
    ]
)


def draw(length, *, heads=4, kv_heads=2, dtype=jnp.float32, batch=2):
    rngs = jax.random.split(jax.random.key(0), 3)
    sizes = (heads, kv_heads, kv_heads)
    return tuple(
        jax.random.normal(rng, (batch, size, length, 64), dtype)
        for rng, size in zip(rngs, sizes, strict=True)
    )


def value_and_gradients(attend, arrays):
    def loss(*arrays):
        out = attend(*arrays).astype(jnp.float32)
        return jnp.sum(jnp.sin(out) * jnp.arange(out.shape[2])[:, None]), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arrays)


def assert_close(got, expected, rtol):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.max(np.abs(a - b)) <= rtol * np.max(np.abs(b))


@pytest.mark.parametrize(
    ("mask", "dtype"),
    [(None, jnp.float32), (Causal(), jnp.bfloat16), (Causal(prefix=128), jnp.float32)],
)
def test_splash_equals_einsum(mask, dtype):
    arrays = draw(256, dtype=dtype)
    got = value_and_gradients(
        lambda *x: fused_attention.fused_attention("splash", *x, mask, interpret=True), arrays
    )
    expected = value_and_gradients(lambda *x: dot_product_attention(*x, mask), arrays)
    assert_close(got, expected, RTOL if dtype == jnp.float32 else ROUNDED)


@pytest.mark.parametrize("kv_heads", [2, 3])  # split over `tensor`, or not
def test_splash_runs_on_the_devices_of_a_batch(kv_heads):
    axes = ("data", "fsdp", "tensor")
    mesh = jax.make_mesh((2, 2, 2), axes, axis_types=(AxisType.Auto,) * 3)
    where = NamedSharding(mesh, PartitionSpec(axes[:2]))
    arrays = draw(128, heads=kv_heads, kv_heads=kv_heads, batch=4)

    def attend(*x):
        with batch_split(where):
            return fused_attention.fused_attention("splash", *x, Causal(), interpret=True)

    got = value_and_gradients(attend, jax.device_put(arrays, where))
    expected = value_and_gradients(lambda *x: dot_product_attention(*x, Causal()), arrays)
    assert_close(got, expected, RTOL)


@pytest.mark.parametrize("mask", [None, Causal(), Causal(prefix=3)])
def test_cudnn_is_told_the_mask_by_flags(monkeypatch, mask):
    attend = jax.nn.dot_product_attention

    def on_cpu(q, k, v, *, is_causal, implementation):
        assert implementation == "cudnn"
        return attend(q, k, v, is_causal=is_causal)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_cpu)
    arrays = draw(7)
    got = value_and_gradients(lambda *x: fused_attention.fused_attention("cudnn", *x, mask), arrays)
    expected = value_and_gradients(lambda *x: dot_product_attention(*x, mask), arrays)
    assert_close(got, expected, RTOL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "package", "kernels"),
    [
        ("v5e:2x2", "libtpu", ["tpu_custom_call"]),
        ("v6e:2x2", "libtpu", ["tpu_custom_call"]),
        ("h200:1x4", "jax_plugins.xla_cuda13", ["__cudnn$fmhaSoftmax", "Backward"]),
    ],
)
@pytest.mark.parametrize("mask", [None, Causal(), Causal(prefix=128)])
def test_gradients_compile_for_devices_that_are_not_there(topology, package, kernels, mask):
    pytest.importorskip(package)
    devices = find_devices(topology)
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    where = NamedSharding(mesh, PartitionSpec(("data",)))
    array = jax.ShapeDtypeStruct((4, 2, 256, 64), jnp.bfloat16, sharding=where)

    def loss(*arrays):
        return jnp.sum(dot_product_attention(*arrays, mask), dtype=jnp.float32)

    with traced_for(devices), batch_split(where), jax.default_matmul_precision("default"):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(array, array, array)
    text = lowered.compile().as_text()
    assert all(kernel in text for kernel in kernels)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["high", "highest"])
def test_kernel_compiles_where_products_are_to_be_precise(precision):
    """As of a tokenizer that decodes in bfloat16."""
    pytest.importorskip("libtpu")
    devices = find_devices("v5e:2x2")[:1]
    where = NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec())
    array = jax.ShapeDtypeStruct((4, 2, 256, 64), jnp.bfloat16, sharding=where)
    with traced_for(devices), jax.default_matmul_precision(precision):
        lowered = jax.jit(dot_product_attention).lower(array, array, array)
    assert "tpu_custom_call" in lowered.compile().as_text()


def choice(device, length=256, mask=None, *, wanted="auto", head_dim=64, keys=None, **options):
    q = jnp.zeros((2, 4, length, head_dim), options.pop("dtype", jnp.bfloat16))
    k = jnp.zeros((2, 2, keys or length, head_dim), q.dtype)
    with traced_for([device] * options.pop("devices", 1)):
        return choose(wanted, q, k, mask, drops_weights=options.pop("drops_weights", False))


@pytest.mark.parametrize(
    ("expected", "options"),
    [
        ("xla", dict(device=CPU)),
        ("xla", dict(device=VOLTA)),
        ("xla", dict(device=AMD)),
        ("cudnn", dict(device=AMPERE)),
        ("cudnn", dict(device=AMPERE, length=257, mask=Causal(prefix=256), devices=8)),
        ("cudnn", dict(device=AMPERE, length=1024, keys=32)),
        ("xla", dict(device=AMPERE, length=1024, keys=16)),
        ("cudnn", dict(device=AMPERE, length=1024, keys=16, wanted="cudnn")),
        ("xla", dict(device=AMPERE, wanted="xla")),
        ("xla", dict(device=AMPERE, dtype=jnp.float32)),
        ("xla", dict(device=AMPERE, drops_weights=True, wanted="cudnn")),
        ("xla", dict(device=AMPERE, mask=jnp.ones((256, 256), bool))),
        ("xla", dict(device=AMPERE, mask=Causal(), keys=512)),
        ("xla", dict(device=AMPERE, head_dim=512)),
        ("splash", dict(device=TPU, mask=Causal(prefix=128))),
        ("xla", dict(device=TPU, mask=Causal(prefix=100))),
        ("xla", dict(device=TPU, length=257)),
        ("xla", dict(device=TPU, devices=8)),
    ],
)
def test_choice_follows_device_dtype_length_and_mask(expected, options):
    assert choice(**options) == expected


@pytest.mark.parametrize(
    ("options", "device", "message"),
    [
        (dict(attention="cudnn"), CPU, "cudnn needs an NVIDIA GPU from Ampere on, and this is cpu"),
        (dict(attention="cudnn"), TPU, "cudnn needs an NVIDIA GPU from Ampere on, and this is TPU"),
        (dict(attention="splash"), AMPERE, "splash needs a TPU, and this is NVIDIA A100"),
        (dict(attention="cudnn"), AMPERE, "needs config.compute.dtype=bfloat16"),
    ],
)
def test_kernel_that_cannot_be_is_refused(options, device, message):
    with pytest.raises(ValueError, match=message):
        check_device(Compute(**options), [device])


def test_kernels_that_can_be_are_taken():
    check_device(Compute(attention="cudnn", dtype="bfloat16"), [AMPERE])
    check_device(Compute(attention="splash", dtype="bfloat16"), [TPU])
    check_device(Compute(), [CPU])
    with pytest.raises(ValueError, match="attention 'flash' must be one of auto, xla"):
        Compute(attention="flash")
