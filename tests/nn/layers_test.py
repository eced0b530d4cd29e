"""Norms, patches, time features, dropout."""

import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dar_jax.nn.adaln import modulate
from dar_jax.nn.compute import Compute
from dar_jax.nn.embeddings import timestep_features
from dar_jax.nn.layers import (
    SwiGlu,
    affine_layer_norm,
    block_init,
    dropout,
    layer_norm,
    linear,
    rms_norm,
)
from dar_jax.nn.layout import batch_split
from dar_jax.nn.patch import patchify, unpatchify
from dar_jax.nn.target import traced_for


@pytest.mark.parametrize(("width", "std"), [(192, 0.04), (768, 0.02), (1024, 0.02)])
def test_blocks_start_with_the_deviation_of_the_reference_from_its_width_on(width, std):
    kernel = block_init(jax.random.key(0), (width, 2 * width))
    assert float(jnp.std(kernel)) == pytest.approx(std, rel=0.02)


def test_linear_layer_rounds_product_and_bias_once():
    layer = linear(257, 1, compute=Compute(dtype="bfloat16"), rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.ones((257, 1))
    layer.bias[...] = jnp.full(1, 0.75)
    found = layer(jnp.ones(257))
    assert found.dtype == jnp.bfloat16 and found == 258  # 257 alone would become 256


def test_layer_norm_standardises_every_token():
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (2, 5, 64))
    y = layer_norm(x)
    np.testing.assert_allclose(jnp.mean(y, axis=-1), 0.0, atol=1e-6)
    np.testing.assert_allclose(jnp.std(y, axis=-1), 1.0, rtol=1e-5)


def test_layer_norm_of_a_constant_is_zero():
    np.testing.assert_array_equal(layer_norm(jnp.full((1, 8), 5.0)), 0.0)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_affine_layer_norm_starts_as_the_parameter_free_one(offset):
    x = offset + jax.random.normal(jax.random.key(0), (3, 16))
    norm = affine_layer_norm(16, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(norm(x), layer_norm(x), atol=1e-5)


def test_rms_norm_divides_by_the_root_mean_square():
    x = jax.random.normal(jax.random.key(0), (3, 16))
    norm = rms_norm(16, epsilon=0.1, rngs=nnx.Rngs(0))
    expected = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 0.1)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-5)


def test_norms_are_float32():
    x = jnp.array([[200, 201, 203, 206]], jnp.bfloat16)  # exact, but their mean is not
    expected = layer_norm(x.astype(jnp.float32))
    norm = affine_layer_norm(4, rngs=nnx.Rngs(0))
    for y in (layer_norm(x), norm(x)):
        assert y.dtype == jnp.float32
        np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_swiglu_gates_with_silu():
    module = SwiGlu(4, 6, compute=Compute(), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 4))
    gate, up = x @ module.gate.kernel[...], x @ module.up.kernel[...]
    expected = (gate / (1 + jnp.exp(-gate)) * up) @ module.down.kernel[...]
    np.testing.assert_allclose(module(x), expected, rtol=1e-5, atol=1e-9)


def test_dropout_keeps_the_mean_and_stops_without_a_key():
    x = jnp.ones((100, 100))
    dropped = dropout(x, 0.25, jax.random.key(0))
    assert set(np.unique(dropped)) == {np.float32(0.0), np.float32(1 / 0.75)}
    assert np.mean(dropped) == pytest.approx(1.0, abs=0.02)
    assert dropout(x, 0.25, None) is x


def test_dropout_of_accelerators_depends_on_the_key_alone():
    x = jnp.ones((100, 100))
    saved = jax.random.key_data(jax.random.key(0))  # as a checkpoint has it
    gpu = types.SimpleNamespace(platform="gpu")

    @jax.jit
    def dropped(x, rng, step):
        return dropout(x, 0.25, jax.random.fold_in(rng, step))

    with traced_for([gpu]):
        assert "rng_bit_generator" in dropped.lower(x, jax.random.key(0), 1).as_text()
        first, second, other = (
            np.asarray(dropped(x, rng, step))
            for rng, step in [
                (jax.random.key(0), 1),
                (jax.random.wrap_key_data(saved), 1),
                (jax.random.key(0), 2),
            ]
        )
    np.testing.assert_array_equal(first, second)
    assert np.mean(first == other) == pytest.approx(0.75**2 + 0.25**2, abs=0.02)
    assert np.mean(first) == pytest.approx(1.0, abs=0.02)
    assert "rng_bit_generator" not in dropped.lower(x, jax.random.key(0), 1).as_text()


def test_devices_draw_for_their_rows_alone():
    """XLA does not split the generator: asked for the rows of all, every device would draw them."""
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    where = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    x = jax.device_put(jnp.ones((16, 4, 100)), where)
    tpu = types.SimpleNamespace(platform="tpu")

    @jax.jit
    def dropped(x, rng):
        with batch_split(where):
            return dropout(x, 0.25, rng)

    with traced_for([tpu] * 8):
        text = dropped.lower(x, jax.random.key(0)).compile().as_text()
        sizes = re.findall(r"u32\[([\d,]+)\]", text)
        assert max(math.prod(map(int, size.split(","))) for size in sizes) == x.size // 8
        rows = np.asarray(dropped(x, jax.random.key(0))).reshape(16, -1)
        np.testing.assert_array_equal(rows.reshape(x.shape), dropped(x, jax.random.key(0)))
    assert len(np.unique(rows, axis=0)) == 16
    assert np.mean(rows) == pytest.approx(1.0, abs=0.02)


def test_modulate_with_zeros_is_the_identity():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    np.testing.assert_array_equal(modulate(x, jnp.zeros(4), jnp.zeros((2, 1, 4))), x)


def test_patches_are_row_major_with_channels_first():
    image = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    patches = patchify(image, 2)
    assert patches.shape == (2, 6, 12)
    window = image[0, 2:4, 4:6]  # row 1, column 2 of a 2 x 3 grid
    np.testing.assert_array_equal(patches[0, 5], window.transpose(2, 0, 1).reshape(-1))


def test_unpatchify_inverts_patchify():
    image = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    np.testing.assert_array_equal(unpatchify(patchify(image, 2), 2, (2, 3)), image)


def test_patch_size_must_divide_the_image():
    with pytest.raises(ValueError, match=r"image of 4x6 pixels.*patch size 4"):
        patchify(jnp.zeros((1, 4, 6, 3)), 4)


def test_timestep_features_put_cosines_first():
    features = timestep_features(jnp.array([0.0, 0.5]), 6)
    frequencies = 10000.0 ** (-np.arange(3) / 3)
    np.testing.assert_array_equal(features[0], [1, 1, 1, 0, 0, 0])
    np.testing.assert_allclose(features[1, :3], np.cos(500 * frequencies), atol=1e-4)
    np.testing.assert_allclose(features[1, 3:], np.sin(500 * frequencies), atol=1e-4)
