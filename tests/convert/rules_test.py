"""The conversion tables: every axis order, both directions, and every complaint."""

import jax
import numpy as np
import pytest

from dar_jax.common import tree
from dar_jax.convert import rules

DEPTH = 3

TABLE = (
    *rules.linear("patchify", "patch", kernel=rules.patch_conv(2)),
    *rules.conv("head", "head", bias=False),
    *rules.linear("point", "point", bias=False, kernel=rules.POINTWISE),
    *rules.embedding("codes", "codes"),
    *rules.under(
        "layers.{i}",
        "blocks",
        (
            *rules.norm("norm", "norm"),
            *rules.tensor("gate", "gate"),
            rules.Rule(
                "attention.wqkv.weight",
                ("attention/q/kernel", "attention/k/kernel", "attention/v/kernel"),
                rules.split((4, 2, 2)),
            ),
            *rules.linear("attention.wo", "attention/out"),
        ),
    ),
)

LAYER_SHAPES = {
    "norm.weight": (4,),
    "norm.bias": (4,),
    "gate": (4,),
    "attention.wqkv.weight": (8, 4),
    "attention.wo.weight": (4, 4),
    "attention.wo.bias": (4,),
}
REFERENCE_SHAPES = {
    "patchify.weight": (4, 3, 2, 2),
    "patchify.bias": (4,),
    "head.weight": (5, 4, 3, 2),
    "point.weight": (6, 4, 1, 1),
    "codes.weight": (7, 4),
} | {f"layers.{i}.{name}": shape for i in range(DEPTH) for name, shape in LAYER_SHAPES.items()}
OUR_SHAPES = {
    "patch/kernel": (12, 4),
    "patch/bias": (4,),
    "head/kernel": (3, 2, 4, 5),
    "point/kernel": (4, 6),
    "codes/embedding": (7, 4),
    "blocks/norm/scale": (DEPTH, 4),
    "blocks/norm/bias": (DEPTH, 4),
    "blocks/gate": (DEPTH, 4),
    "blocks/attention/q/kernel": (DEPTH, 4, 4),
    "blocks/attention/k/kernel": (DEPTH, 4, 2),
    "blocks/attention/v/kernel": (DEPTH, 4, 2),
    "blocks/attention/out/kernel": (DEPTH, 4, 4),
    "blocks/attention/out/bias": (DEPTH, 4),
}


@pytest.fixture
def state_dict():
    random = np.random.default_rng(0)
    return {n: random.standard_normal(s).astype(np.float32) for n, s in REFERENCE_SHAPES.items()}


@pytest.fixture
def like():
    return tree.unflatten({n: jax.ShapeDtypeStruct(s, np.float32) for n, s in OUR_SHAPES.items()})


def test_to_params_fills_every_leaf(state_dict, like):
    params = tree.flatten(rules.to_params(TABLE, state_dict, like))
    assert {name: leaf.shape for name, leaf in params.items()} == OUR_SHAPES
    assert all(leaf.dtype == np.float32 for leaf in params.values())


def test_to_params_computes_what_torch_would(state_dict, like):
    params = rules.to_params(TABLE, state_dict, like)
    random = np.random.default_rng(1)
    x = random.standard_normal(4).astype(np.float32)
    fused = state_dict["layers.2.attention.wqkv.weight"] @ x
    ours = params["blocks"]["attention"]
    parts = [x @ ours[name]["kernel"][2] for name in "qkv"]
    np.testing.assert_allclose(np.concatenate(parts), fused, rtol=1e-5)
    patch = random.standard_normal((3, 2, 2)).astype(np.float32)
    expected = np.einsum("dcpq,cpq->d", state_dict["patchify.weight"], patch)
    np.testing.assert_allclose(patch.reshape(-1) @ params["patch"]["kernel"], expected, rtol=1e-5)
    assert params["head"]["kernel"][2, 1, 3, 4] == state_dict["head.weight"][4, 3, 2, 1]


def test_to_state_dict_inverts_to_params(state_dict, like):
    back = rules.to_state_dict(TABLE, rules.to_params(TABLE, state_dict, like))
    assert set(back) == set(state_dict)
    for name, array in back.items():
        np.testing.assert_array_equal(array, state_dict[name])


def test_to_params_keeps_integer_list_indices():
    like = {"layers": {i: {"scale": jax.ShapeDtypeStruct((2,), np.float32)} for i in range(11)}}
    table = [rule for i in range(11) for rule in rules.norm(f"l.{i}", f"layers/{i}", bias=False)]
    params = rules.to_params(table, {f"l.{i}.weight": np.full(2, i) for i in range(11)}, like)
    assert jax.tree.structure(params) == jax.tree.structure(like)
    assert all(params["layers"][i]["scale"][0] == i for i in range(11))


def test_to_params_ignores_named_buffers(state_dict, like):
    state_dict["stats.queue"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"surplus stats\.queue"):
        rules.to_params(TABLE, state_dict, like)
    rules.to_params(TABLE, state_dict, like, ignored=("stats.*",))


def test_to_params_names_missing_layer(state_dict, like):
    del state_dict["layers.1.attention.wqkv.weight"]
    with pytest.raises(ValueError, match=r"missing layers\.1\.attention\.wqkv\.weight"):
        rules.to_params(TABLE, state_dict, like)


def test_to_params_names_surplus_layer(state_dict, like):
    state_dict[f"layers.{DEPTH}.gate"] = np.zeros(4)
    with pytest.raises(ValueError, match=r"surplus layers\.3\.gate"):
        rules.to_params(TABLE, state_dict, like)


@pytest.mark.parametrize("shape", [(4, 5), (4,), (2, 2, 2)])
def test_to_params_names_misshapen(state_dict, like, shape):
    state_dict["point.weight"] = np.zeros(shape)
    with pytest.raises(
        ValueError, match=r"misshapen point\.weight has \(.*expected \(6, 4, 1, 1\)"
    ):
        rules.to_params(TABLE, state_dict, like)


def test_to_params_lists_only_the_first_names(like):
    with pytest.raises(ValueError, match=r"missing .* and \d+ more") as error:
        rules.to_params(TABLE, {}, like)
    assert str(error.value).count(",") < rules.MAX_LISTED


def test_table_must_cover_the_model(state_dict, like):
    with pytest.raises(ValueError, match="leaf without a rule patch/bias, patch/kernel"):
        rules.to_params(TABLE[2:], state_dict, like)
    with pytest.raises(ValueError, match="rule without a leaf extra"):
        rules.to_params((*TABLE, *rules.tensor("extra", "extra")), state_dict, like)
    with pytest.raises(ValueError, match="leaf with two rules head/kernel"):
        rules.to_params((*TABLE, *rules.tensor("extra", "head/kernel")), state_dict, like)
