"""DINOv2: shapes of the published sizes, names of three repositories, parity with torch."""

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.common import tree
from dar_jax.convert import dinov2 as convert_dinov2
from dar_jax.convert import rules
from dar_jax.models.frozen.dinov2 import IMAGE_SIZE, SIZES, Dinov2, Dinov2Config, preprocess
from dar_jax.nn.functional_model import FunctionalModel

CONFIG = Dinov2Config(dim=32, depth=2, num_heads=4, patch_size=56)
MODEL = FunctionalModel(Dinov2, CONFIG)
PUBLISHED_PARAMETERS = {"s": 22_056_576, "b": 86_580_480, "l": 304_368_640}
"""Of the repository's models, with the positions of 518 x 518 pixels and a mask token."""
TABLE_518 = 1 + 37**2
TOLERANCE = 1e-4  # float32 through up to 24 blocks


@pytest.fixture(scope="module")
def state_dict():
    """Random weights under the repository's names."""
    table = convert_dinov2.table(CONFIG)
    shapes = rules.reference_shapes(table, MODEL.abstract_params())
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}


def hf_names(state_dict):
    """The same weights as HF transformers name them."""
    renamed = {}
    for name, array in state_dict.items():
        name = name.replace("blocks.", "encoder.layer.").replace(".gamma", ".lambda1")
        name = name.replace("attn.proj", "attention.output.dense").replace(".ls", ".layer_scale")
        name = name.replace("cls_token", "embeddings.cls_token")
        name = name.replace("pos_embed", "embeddings.position_embeddings")
        name = name.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
        name = "layernorm." + name.removeprefix("norm.") if name.startswith("norm.") else name
        if "qkv" not in name:
            renamed[name] = array
            continue
        parts = zip(("query", "key", "value"), np.split(array, 3), strict=True)
        for part, rows in parts:
            renamed[name.replace("attn.qkv", f"attention.attention.{part}")] = rows
    return {**renamed, "embeddings.mask_token": np.zeros((1, CONFIG.dim), np.float32)}


def convert(state_dict, config=CONFIG):
    model = FunctionalModel(Dinov2, config)
    return convert_dinov2.from_reference(state_dict, config, model.abstract_params())


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size):
    config = SIZES[size]
    params = FunctionalModel(Dinov2, config).abstract_params()
    resampled = (TABLE_518 - params["position_table"].shape[0]) * config.dim
    mask_token = config.dim
    assert tree.num_parameters(params) + resampled + mask_token == PUBLISHED_PARAMETERS[size]
    assert convert_dinov2.config_of({"cls_token": np.zeros((1, 1, config.dim))}) == config


def test_names_of_hf_give_the_same_parameters(state_dict):
    expected, params = convert(state_dict), convert(hf_names(state_dict))
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_conversion_is_reversible(state_dict):
    back = rules.to_state_dict(convert_dinov2.table(CONFIG), convert(state_dict))
    assert set(back) == set(state_dict)
    for name, array in back.items():
        np.testing.assert_array_equal(array, state_dict[name])


def test_missing_and_foreign_weights_are_named(state_dict):
    with pytest.raises(ValueError, match=r"missing blocks\.1\.attn\.qkv\.bias"):
        convert({n: a for n, a in state_dict.items() if n != "blocks.1.attn.qkv.bias"})
    with pytest.raises(ValueError, match=r"surplus register_tokens"):
        convert({**state_dict, "register_tokens": np.zeros(4)})
    with pytest.raises(ValueError, match="cls_token has width .100,.; known: s .384."):
        convert_dinov2.config_of({"cls_token": np.zeros((1, 1, 100))})


def test_features_are_those_of_the_patches_in_their_order(state_dict):
    """A change of one patch moves that patch's feature most."""
    model = MODEL.bind(convert(state_dict))
    image = jax.random.normal(jax.random.key(0), (1, IMAGE_SIZE, IMAGE_SIZE, 3))
    changed = image.at[:, 56:112, 112:168].add(1.0)
    moved = jnp.linalg.norm(model(changed) - model(image), axis=-1)[0]
    assert moved.shape == (16,)
    assert jnp.argmax(moved) == 1 * 4 + 2


@pytest.mark.slow
def test_positions_are_resampled_as_torch_does():
    torch = pytest.importorskip("torch")
    positions = np.random.default_rng(0).normal(size=(1, TABLE_518, 5)).astype(np.float32)
    grid = einops.rearrange(torch.tensor(positions[:, 1:]), "1 (h w) d -> 1 d h w", h=37)
    scale = (16 + convert_dinov2.INTERPOLATION_OFFSET) / 37
    expected = torch.nn.functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    found = convert_dinov2.resample_positions(positions, 16)
    np.testing.assert_array_equal(found[:, 0], positions[:, 0])
    expected = einops.rearrange(expected.numpy(), "1 d h w -> 1 (h w) d")
    np.testing.assert_allclose(found[:, 1:], expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_features_equal_those_of_timm(size, stub_torchvision):
    """Random weights of the published sizes; timm's module knows nothing of ours."""
    torch = pytest.importorskip("torch")
    timm = pytest.importorskip("timm")
    names = {"s": "small", "b": "base", "l": "large"}
    reference = timm.create_model(
        f"vit_{names[size]}_patch14_dinov2", img_size=IMAGE_SIZE, num_classes=0
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            if "gamma" in name:  # 1e-5 in a fresh model would hide every block
                weight.uniform_(0.1, 0.5, generator=generator)
            elif weight.ndim == 1:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    state_dict = {name: array.numpy() for name, array in reference.state_dict().items()}
    config = convert_dinov2.config_of(state_dict)
    assert config == SIZES[size]
    image = np.random.default_rng(1).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
    inputs = preprocess(jnp.asarray(image))
    with torch.no_grad():
        nchw = einops.rearrange(np.array(inputs), "b h w c -> b c h w")
        expected = reference.forward_features(torch.tensor(nchw))[:, 1:].numpy()
    model = FunctionalModel(Dinov2, config)
    params = convert_dinov2.from_reference(state_dict, config, model.abstract_params())
    found = jax.jit(lambda params, x: model.bind(params)(x))(params, inputs)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
