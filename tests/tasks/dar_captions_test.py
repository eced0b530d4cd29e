"""Training the prior on captions: the masked loss in float64, dropout, the null caption."""

import dataclasses

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.common import model_dir
from dar_jax.data import codes
from dar_jax.data.base import DataConfig
from dar_jax.kinds import find_kind
from dar_jax.models.dar.llama import Llama
from dar_jax.models.dar.tokenizer import Tokenizer
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.parallel import sharding
from dar_jax.parallel.sharding import MeshConfig
from dar_jax.tasks.base import FrozenModel
from dar_jax.tasks.dar_prior import DarPriorTask
from dar_jax.training.optimizer import OptimizerConfig
from dar_jax.training.state import create_state
from dar_jax.training.step import make_train_step
from tests.random_params import random_params
from tests.tiny_model import NUM_TOKENS, PRIOR, TOKENIZER

RTOL = 2e-5
"""Of the gradient as one vector: float32 against float64."""
TEXT_TOKENS, TEXT_DIM, BATCH = 5, 12, 4
CONFIG = dataclasses.replace(
    PRIOR,
    num_layers=2,
    num_heads=2,
    dim=16,
    caption_dim=TEXT_DIM,
    condition_tokens=TEXT_TOKENS,
    token_dropout=0.0,
    residual_dropout=0.0,
    label_dropout=0.0,
)
LENGTHS = np.array([1, 3, 5, 2])


def make_task(**changes):
    tokenizer = FunctionalModel(Tokenizer, TOKENIZER)
    frozen = FrozenModel(tokenizer, tokenizer.abstract_params())
    config = dataclasses.replace(CONFIG, **changes)
    return DarPriorTask(config, frozen, Compute(), from_codes=True)


@pytest.fixture(scope="module")
def params():
    model = FunctionalModel(make_task().model.cls, CONFIG)
    return jax.device_put(random_params(model.abstract_params()))


def make_batch():
    rng = np.random.default_rng(0)
    mask = np.arange(TEXT_TOKENS) >= TEXT_TOKENS - LENGTHS[:, None]
    features = rng.normal(size=(BATCH, TEXT_TOKENS, TEXT_DIM)) * mask[..., None]
    batch = {
        "codes": rng.integers(0, 32, (BATCH, 1, NUM_TOKENS), np.uint16),
        "label": np.zeros(BATCH, np.int32),
        "captions": features.astype(jnp.bfloat16),
        "caption_mask": mask,
    }
    return jax.tree.map(jnp.asarray, batch)


def reference_loss(params, captions, mask, indices):
    """The loss as the specification has it, one formula after the other."""
    embed, blocks = params["condition_embed"], params["stack"]["blocks"]
    hidden = captions @ embed["hidden"]["kernel"]
    cubic = np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)
    condition = 0.5 * hidden * (1 + jnp.tanh(cubic)) @ embed["out"]["kernel"]
    tokens = params["token_embed"]["embedding"][indices[:, :-1]]
    x = jnp.concatenate([condition, tokens], axis=1)
    length = x.shape[1]
    seen = np.ones((BATCH, length, length), bool)
    for b, i, j in np.ndindex(seen.shape):
        seen[b, i, j] = i == j or (j < i and (j >= TEXT_TOKENS or mask[b, j]))

    def norm(x, scale):
        return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + CONFIG.norm_epsilon) * scale

    def rotate(x):
        half = CONFIG.head_dim // 2
        angles = np.arange(length)[:, None] * 10000.0 ** (-np.arange(half) / half)
        rotated = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
        return jnp.stack([rotated.real, rotated.imag], -1).reshape(x.shape)

    for layer in range(CONFIG.num_layers):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], blocks)
        y = norm(x, block["attention_norm"]["scale"])
        q, k, v = (
            einops.rearrange(y @ block["attention"][n]["kernel"], "b n (h d) -> b h n d", h=2)
            for n in "qkv"
        )
        scores = rotate(q) @ rotate(k).swapaxes(-1, -2) / np.sqrt(CONFIG.head_dim)
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
        out = einops.rearrange(weights @ v, "b h n d -> b n (h d)")
        x = x + out @ block["attention"]["out"]["kernel"]
        y, ffn = norm(x, block["ffn_norm"]["scale"]), block["ffn"]
        gate = y @ ffn["gate"]["kernel"]
        x = x + (gate / (1 + jnp.exp(-gate)) * (y @ ffn["up"]["kernel"])) @ ffn["down"]["kernel"]
    logits = norm(x, params["norm"]["scale"])[:, TEXT_TOKENS - 1 :] @ params["output"]["kernel"]
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), indices[..., None], axis=-1)
    return -jnp.mean(chosen)


def test_loss_and_gradient_equal_the_masked_loss_in_float64(params):
    task, batch = make_task(), make_batch()
    loss = lambda p: task.loss(p, batch, jax.random.key(0), {})[0]  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    batch = jax.tree.map(np.asarray, batch)
    with jax.enable_x64(True):
        inputs = batch["captions"].astype(np.float64), batch["caption_mask"]
        indices = batch["codes"][:, 0].astype(np.int64)
        expected, reference = jax.value_and_grad(reference_loss)(wide, *inputs, indices)
        assert expected.dtype == np.float64
    assert float(value) == pytest.approx(float(expected), rel=RTOL)
    del gradient["condition_embed"]["null_caption"], reference["condition_embed"]["null_caption"]
    found, wanted = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (gradient, reference)
    )
    assert np.linalg.norm(found - wanted) < RTOL * np.linalg.norm(wanted)


def test_padding_before_a_caption_does_not_matter(params):
    task, batch = make_task(), make_batch()
    loss = jax.jit(lambda batch: task.loss(params, batch, jax.random.key(0), {})[0])
    padded = jnp.where(batch["caption_mask"][..., None], batch["captions"], jnp.bfloat16(7))
    seen = {**batch, "caption_mask": jnp.ones_like(batch["caption_mask"])}
    assert loss({**batch, "captions": padded}) == loss(batch) != loss(seen)


def test_a_caption_is_dropped_whole_or_not_at_all(params):
    prior = make_task(label_dropout=0.5).model.bind(params)
    captions = jnp.ones((64, TEXT_TOKENS, TEXT_DIM))
    draws = jax.random.uniform(jax.random.key(0), (64,))
    found = np.asarray(prior.drop_condition(captions, draws))
    null = np.asarray(params["condition_embed"]["null_caption"])
    dropped = np.array([np.array_equal(row, null) for row in found])
    np.testing.assert_array_equal(dropped, np.asarray(draws) < 0.5)
    np.testing.assert_array_equal(found[~dropped], 1.0)


def test_all_captions_dropped_is_the_loss_of_the_null_caption(params):
    batch, null = make_batch(), np.asarray(params["condition_embed"]["null_caption"])
    losses = [
        jax.jit(task.loss)(params, given, jax.random.key(0), {})[0]
        for task, given in (
            (make_task(label_dropout=1.0), batch),
            (make_task(), {**batch, "captions": jnp.stack([null] * BATCH)}),
        )
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_null_caption_stays_where_it_was_drawn(params, name):
    task = make_task(label_dropout=0.5)
    optimizer = OptimizerConfig(
        name=name, learning_rate=1e-2, warmup_steps=0, weight_decay=0.5, ema_decay=0.9
    )
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    copied = sharding.put(jax.tree.map(np.asarray, params), mesh)
    state = create_state(task, optimizer, jax.random.key(0), mesh=mesh, params=copied)
    step = make_train_step(task, optimizer, jax.tree.map(lambda leaf: leaf.sharding, state))
    batch = sharding.put_batch(jax.tree.map(np.asarray, make_batch()), mesh)
    for _ in range(500):
        state, metrics = step(state, batch, {})
    before, after = params["condition_embed"], state.params["condition_embed"]
    for kept in (after, state.eval_params["condition_embed"]):
        np.testing.assert_array_equal(kept["null_caption"], before["null_caption"])
    assert not np.allclose(after["hidden"]["kernel"], before["hidden"]["kernel"], atol=0.1)
    assert float(metrics.loss.compute()) < np.log(32)


def test_distilled_prior_knows_the_encoder_of_its_captions(monkeypatch):
    """As the prior does that it learns from, if that knows its own."""
    monkeypatch.setattr(codes, "text_digest", lambda path: "of the cache")
    kind = find_kind("dar_distilled", "config.task")

    def task(teacher_digest):
        there = dict(text_encoder="encoders/t5", text_digest=teacher_digest)
        prior = FunctionalModel(Llama, dataclasses.replace(CONFIG, **there))
        tokenizer = FunctionalModel(Tokenizer, TOKENIZER)
        model = dataclasses.replace(CONFIG, text_encoder="hf://google/t5", max_guidance=4.0)
        companions = {
            name: FrozenModel(each, each.abstract_params())
            for name, each in {"teacher": prior, "tokenizer": tokenizer}.items()
        }
        data = DataConfig(source="codes", path="codes", captions=True)
        return kind.task(model, None, compute=Compute(), data=data, companions=companions)

    for known in ("", "of the cache"):
        assert task(known).model_config()["text_digest"] == "of the cache"
    with pytest.raises(ValueError, match="config.teacher was trained on .* text_digest='another'"):
        task("another")


def test_all_but_the_condition_embedding_comes_from_a_model_of_classes(tmp_path):
    classes = FunctionalModel(
        Llama, dataclasses.replace(CONFIG, caption_dim=None, condition_tokens=1)
    )
    there = random_params(classes.abstract_params(), seed=1)
    model_dir.save_model(tmp_path / "model", "dar_prior", {}, there, {})
    like = FunctionalModel(Llama, CONFIG).abstract_params()
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    where = jax.tree.map(lambda _: sharding.replicated(mesh), like)
    found = model_dir.load_fitting(tmp_path / "model", like, where, make_task().adapters())
    assert {line.partition(" ")[0] for line in found.lacking} == {
        f"condition_embed/{name}" for name in ("null_caption", "hidden/kernel", "out/kernel")
    }
    assert found.unused == ["condition_embed/embedding"]
    del there["condition_embed"]
    jax.tree.map(np.testing.assert_array_equal, found.params, there)
