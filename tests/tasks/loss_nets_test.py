"""Terms of the tokenizer's loss that other networks judge, on networks of a few channels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dar_jax.losses.alignment import alignment_loss
from dar_jax.models.dar.decoder import FlowDecoderConfig
from dar_jax.models.dar.encoder import EncoderConfig
from dar_jax.models.dar.tokenizer import ConditionConfig, TokenizerConfig, window_start
from dar_jax.models.frozen import pretrained
from dar_jax.models.frozen.dinov2 import Dinov2, Dinov2Config, preprocess
from dar_jax.models.frozen.lpips import Lpips, LpipsConfig, StageConfig
from dar_jax.models.patchgan import PatchGanConfig
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.parallel import sharding
from dar_jax.tasks.base import DISCRIMINATOR, Task
from dar_jax.tasks.dar_tokenizer import DarTokenizerTask, TokenizerLossConfig
from dar_jax.tasks.time_groups import time_group
from dar_jax.training import state as state_lib
from dar_jax.training.optimizer import OptimizerConfig
from dar_jax.training.step import make_train_step
from tests.random_params import random_params

CONFIG = TokenizerConfig(
    image_size=16,
    num_tokens=8,
    num_groups=4,
    num_steps=4,
    codebook_size=32,
    code_dim=4,
    max_tokens=8,
    encoder=EncoderConfig(patch_size=8, dim=16, depth=1, head_dim=16),
    condition=ConditionConfig(dim=16, depth=0, head_dim=16),
    decoder=FlowDecoderConfig(patch_size=8, dim=16, depth=1, head_dim=16, feature_layer=None),
)
ALIGNED = dataclasses.replace(
    CONFIG,
    decoder=dataclasses.replace(
        CONFIG.decoder, patch_size=1, feature_layer=0, feature_dim=384, feature_hidden_dim=16
    ),
)
"""A grid of 16 x 16 patches, as alignment needs."""
BATCH = 4
START = 2
SMALL_LPIPS = FunctionalModel(Lpips, LpipsConfig((StageConfig((4, 4)), StageConfig((6,), pool=2))))
SMALL_DINOV2 = FunctionalModel(Dinov2, Dinov2Config(dim=384, depth=1, num_heads=2))


def make_task(**weights):
    """The task with small frozen networks in the places of the real ones."""
    loss = TokenizerLossConfig(
        adversarial_start=START, discriminator=PatchGanConfig(width=8, num_layers=1), **weights
    )
    config = ALIGNED if loss.alignment_weight else CONFIG
    task = DarTokenizerTask(config, loss, Compute())
    if loss.perceptual_weight:
        task.nets.lpips = SMALL_LPIPS
    if loss.alignment_weight:
        task.nets.dinov2 = SMALL_DINOV2
    return task


@pytest.fixture(scope="module")
def frozen():
    nets = {"lpips": SMALL_LPIPS, "dinov2": SMALL_DINOV2}
    return {n: jax.device_put(random_params(net.abstract_params())) for n, net in nets.items()}


@pytest.fixture
def batch():
    pixels = jax.random.randint(jax.random.key(1), (BATCH, 16, 16, 3), 0, 256)
    return {"pixels": pixels.astype(jnp.uint8), "label": jnp.zeros(BATCH, jnp.int32)}


def params_of(task):
    return jax.device_put(random_params(jax.eval_shape(task.init, jax.random.key(0))))


def test_loss_is_the_weighted_sum_of_its_terms(batch, frozen):
    weights = {"entropy": 0.1, "perceptual": 0.5, "alignment": 0.25, "adversarial": 0.125}
    task = make_task(**{f"{name}_weight": weight for name, weight in weights.items()})
    params = params_of(task)
    loss_of = jax.jit(task.loss)
    loss, out = loss_of(params, {**batch, "step": jnp.int32(START)}, jax.random.key(2), frozen)
    expected = out["flow_loss"] + out["codebook_loss"] + out["commitment_loss"]
    for name, weight in weights.items():
        if name != "adversarial":
            expected += weight * out[f"{name}_loss"]
    expected += weights["adversarial"] * (out["generator_loss"] + out["discriminator_loss"])
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    terms = {name for name in out if name.endswith("_loss")}
    assert terms < set(task.metrics()) and all(float(out[name]) != 0 for name in terms)
    check_time_groups(task, out)
    before, out = loss_of(
        params, {**batch, "step": jnp.int32(START - 1)}, jax.random.key(2), frozen
    )
    assert out["generator_loss"] == out["discriminator_loss"] == 0.0
    assert before < loss


def test_perceptual_term_is_of_one_in_so_many_images(frozen):
    image, predicted = jax.random.uniform(jax.random.key(1), (2, 5, 16, 16, 3), minval=-1.0)

    def loss_of(task):
        return jax.jit(task.nets.perceptual_loss)(frozen, image, predicted)

    every = make_task(perceptual_weight=1.0, perceptual_every=2)
    chosen = jnp.array([0, 2, 4])
    expected = jax.jit(every.nets.perceptual)(frozen, image[chosen], predicted[chosen])
    np.testing.assert_allclose(loss_of(every), expected, rtol=1e-6)
    assert abs(float(loss_of(make_task(perceptual_weight=1.0)) / expected) - 1) > 1e-3


def test_perceptual_term_begins_in_time(batch, frozen):
    late, always = (
        make_task(perceptual_weight=1.0, perceptual_start=start) for start in (START, 0)
    )
    params = params_of(late)

    def loss_and_gradient(task, step):
        of = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
        (_, out), gradient = of(
            params, {**batch, "step": jnp.int32(step)}, jax.random.key(2), frozen
        )
        return out["perceptual_loss"], gradient

    before, without = loss_and_gradient(late, START - 1)
    begun, with_it = loss_and_gradient(late, START)
    expected, same = loss_and_gradient(always, START)
    assert before == 0.0 != begun
    np.testing.assert_allclose(begun, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), with_it, same)
    assert optax.tree_utils.tree_norm(optax.tree_utils.tree_sub(with_it, without)) > 1e-3


def check_time_groups(task, out):
    """The flow loss of a group is the mean over the samples whose time fell into it."""
    sums, counts = out["group_sums"]
    assert counts.sum() == BATCH
    assert sums.sum() / BATCH == pytest.approx(float(out["flow_loss"]), rel=1e-5)
    group = int(jnp.argmax(counts))
    metric = task.metrics()[f"flow_loss_{group + 1}"].from_model_output(**out)
    assert metric.merge(metric).compute() == pytest.approx(float(sums[group] / counts[group]))
    empty = {"group_sums": jnp.zeros_like(out["group_sums"])}
    assert np.isnan(task.metrics()["flow_loss_1"].from_model_output(**empty).compute())


def test_time_group_is_that_of_the_window():
    u = jnp.linspace(0, 1, 64, endpoint=False)
    start = window_start(u, CONFIG)
    np.testing.assert_array_equal(time_group(u, CONFIG.num_groups), start // CONFIG.window)


def test_alignment_compares_the_features_of_the_image_itself(batch, frozen):
    task = make_task(alignment_weight=1.0)
    image = jnp.asarray(batch["pixels"], jnp.float32) / 127.5 - 1
    features = jax.random.normal(jax.random.key(0), (BATCH, 256, 384))
    features_of = jax.jit(lambda params, x: SMALL_DINOV2.bind(params)(preprocess(x)))
    target = features_of(frozen["dinov2"], image)
    alignment = jax.jit(task.nets.alignment)
    found = alignment(frozen, image, features)
    assert found == pytest.approx(float(alignment_loss(target, features)), rel=1e-4)
    assert alignment(frozen, image, target) == pytest.approx(0.0, abs=1e-5)


def test_perceptual_term_pulls_the_prediction_towards_the_image(frozen):
    task = make_task(perceptual_weight=1.0)
    image, other = jax.random.uniform(jax.random.key(0), (2, 4, 16, 16, 3), minval=-1)
    value_and_slope = jax.jit(jax.value_and_grad(task.nets.perceptual, argnums=2))
    value, slope = value_and_slope(frozen, image, other)
    assert value_and_slope(frozen, image, other - 0.1 * slope)[0] < value
    assert value_and_slope(frozen, image, image)[0] == pytest.approx(0.0, abs=1e-9)


@pytest.fixture(scope="module")
def adversarial():
    task = make_task(adversarial_weight=0.5)
    assert isinstance(task, Task)
    return task, params_of(task)


@pytest.mark.parametrize("part", ["generator_loss", "discriminator_loss"])
def test_generator_and_discriminator_do_not_move_each_other(adversarial, batch, part):
    task, params = adversarial
    inputs = ({**batch, "step": jnp.int32(START)}, jax.random.key(2), {})
    grads = jax.jit(jax.grad(lambda params: task.loss(params, *inputs)[1][part]))(params)
    norms = {name: float(optax.tree.norm(grad)) for name, grad in grads.items()}
    own = {DISCRIMINATOR} if part == "discriminator_loss" else {"decoder"}
    assert all(norms[name] > 0 for name in own)
    foreign = {DISCRIMINATOR} if part == "generator_loss" else set(norms) - own
    assert all(norms[name] == 0 for name in foreign)


@pytest.mark.slow
def test_one_step_trains_both_and_the_discriminator_waits_for_its_start(batch):
    task = make_task(adversarial_weight=0.5)
    config = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, ema_decay=0.9)
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    state = state_lib.create_state(task, config, jax.random.key(0), mesh=mesh)
    step = make_train_step(task, config, jax.tree.map(lambda leaf: leaf.sharding, state))
    batch = sharding.put_batch(jax.device_get(batch), mesh)
    moved = []
    for _ in range(START + 1):
        before = jax.device_get(state.params)
        state, update = step(state, batch, {})
        changed = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), before, state.params)
        moved.append({name: max(jax.tree.leaves(part)) for name, part in changed.items()})
    assert all(part["decoder"] > 0 for part in moved)
    assert [part[DISCRIMINATOR] > 0 for part in moved] == [False, False, True]
    assert float(update.discriminator_loss.compute()) > 0
    released = task.released(state.eval_params)
    assert jax.tree.structure(released) == jax.tree.structure(task.model.abstract_params())


def test_held_out_metrics_measure_reconstructions(batch, frozen):
    task = make_task(perceptual_weight=0.5)
    params = params_of(task)
    values = task.held_out_metrics(params, batch, jax.random.key(0), frozen)
    assert set(values) == {"psnr_db", "lpips"}
    assert 3 < values["psnr_db"] < 20 and values["lpips"] > 0


def test_missing_weights_are_one_line_and_weight_zero_needs_none(monkeypatch):
    monkeypatch.setattr(pretrained, "PACKAGE", "no-such-package")
    for weights, remedy in (
        ({"perceptual_weight": 0.5}, "--config.loss.perceptual_weight=0.0"),
        ({"alignment_weight": 0.5}, "--config.loss.alignment_weight=0.0"),
    ):
        with pytest.raises(ValueError, match=remedy) as caught:
            make_task(**weights).frozen()
        assert "\n" not in str(caught.value)
    assert make_task().frozen() == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_layer": None}, "needs alignment features"),
        ({"patch_size": 2}, "got 8 rows"),
        ({"feature_dim": 64}, "feature_dim=64 must be a width of DINOv2: 384, 768, 1024"),
    ],
)
def test_alignment_refuses_a_model_whose_features_do_not_fit(change, message):
    decoder = dataclasses.replace(ALIGNED.decoder, **change)
    config = dataclasses.replace(CONFIG, decoder=decoder)
    with pytest.raises(ValueError, match=message):
        DarTokenizerTask(config, TokenizerLossConfig(alignment_weight=0.5), Compute())


def test_run_is_bound_to_the_networks_that_its_loss_needs():
    weights = dict(perceptual_weight=0.5, alignment_weight=0.5, dinov2="runs/dinov2")
    assert make_task(**weights).files() == {"loss.dinov2": "runs/dinov2"}
    assert make_task(dinov2="runs/dinov2", lpips="runs/lpips").files() == {}
    task = make_task(perceptual_weight=0.5, lpips="runs/lpips")
    assert task.files() == {"loss.lpips": "runs/lpips"}


def test_negative_weight_is_refused():
    with pytest.raises(ValueError, match="perceptual_weight=-0.5 must not be negative"):
        TokenizerLossConfig(perceptual_weight=-0.5)
    with pytest.raises(ValueError, match="perceptual_every=0 must be at least 1"):
        TokenizerLossConfig(perceptual_every=0)
