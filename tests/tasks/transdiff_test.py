"""Training TransDiff: three updates of the reference, what batches may be, starting from others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dar_jax.common import model_dir, tree
from dar_jax.convert import transdiff as convert
from dar_jax.convert.rules import to_state_dict
from dar_jax.kinds.loading import frozen_model
from dar_jax.kinds.transdiff import TransDiffKind
from dar_jax.nn.compute import Compute
from dar_jax.parallel import sharding
from dar_jax.parallel.sharding import MeshConfig
from dar_jax.tasks.transdiff import TransDiffLossConfig, TransDiffTask, diversity
from dar_jax.training import optimizer as optimizer_lib
from dar_jax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from dar_jax.training.state import create_state
from dar_jax.training.step import make_train_step
from tests import tiny_transdiff
from tests.golden import fixtures
from tests.models.transdiff.golden_test import Training
from tests.random_params import random_params
from tests.tiny_transdiff import LARGE, MRAR, VAE
from tests.tiny_transdiff import ONE_STEP as MODEL

UPDATES = "transdiff/train_updates"
STEPS_PER_EPOCH = 4
"""Makes every epoch of the fixture a whole step."""


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """Model directory of an autoencoder of random weights."""
    return str(tiny_transdiff.save_vae(tmp_path_factory.mktemp("models")))


@pytest.fixture
def make_task(vae):
    def make(config=MODEL, **loss):
        size = config.latent_size * VAE.stride
        loss = TransDiffLossConfig(copies=2, **loss)
        return TransDiffTask(
            config, loss, frozen_model("kl_vae", vae, Compute()), Compute(), image_size=size
        )

    return make


@pytest.mark.slow
def test_updates_equal_the_reference(monkeypatch):
    reference = fixtures.load_json(UPDATES, "config")
    run = Training("transdiff/transdiff_tiny", fixtures.load_io("transdiff/transdiff_tiny")[0])
    rules = convert.transdiff_rules(run.model.config)
    config = OptimizerConfig(
        weight_decay=reference["weight_decay"],
        undecayed="decoder/",
        clip_norm=reference["grad_clip"],
        ema_decay=reference["ema_rate"],
    )
    groups = optimizer_lib.weight_decay_mask(run.params, config.undecayed)
    named = to_state_dict(rules, jax.tree.map(lambda p, d: np.full(p.shape, d), run.params, groups))
    decayed = {name for name, values in named.items() if np.all(values)}
    assert decayed == set(reference["groups"]["decay"])

    def loss(params):
        labels = run.model.bind(params).drop_labels(run.labels, run.drop)
        return jnp.mean(run.losses(params, labels))

    gradient = jax.jit(jax.value_and_grad(loss))
    with fixtures.Compare(UPDATES) as golden:
        # Rates at half epochs, which no schedule of steps has.
        rates = golden.arrays["lrs"]
        monkeypatch.setattr(
            optimizer_lib, "learning_rate_schedule", lambda _: lambda step: jnp.asarray(rates)[step]
        )
        optimizer = make_optimizer(config)
        params = ema = run.params
        state, losses, norms = optimizer.init(params), [], []
        for _ in rates:
            value, grads = gradient(params)
            losses.append(value)
            norms.append(optax.tree.norm(grads))
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            ema = optax.incremental_update(params, ema, 1 - config.ema_decay)
        monkeypatch.undo()
        golden.check_all(losses=losses, grad_norms=norms)
        golden.check("loss_after", gradient(params)[0])
        golden.check("loss_after_ema", gradient(ema)[0])
        for kind, values in (("param", params), ("ema", ema)):
            ours = to_state_dict(rules, values)
            order = reference["param_order"]
            golden.check(f"{kind}_norms", [np.linalg.norm(ours[name]) for name in order])
            for name in golden.spec:
                if name.startswith(f"{kind}/"):
                    golden.check(name, ours[name.removeprefix(f"{kind}/")])
        check_rates(golden, reference)


def check_rates(golden, reference):
    """Both schedules, and the rates of the three updates."""
    args = reference["lr_args"]
    constant = OptimizerConfig(
        learning_rate=args["lr"], warmup_steps=args["warmup_epochs"] * STEPS_PER_EPOCH
    )
    cosine = dataclasses.replace(
        constant,
        decay_shape="cosine",
        decay_start=constant.warmup_steps,
        decay_end=args["epochs"] * STEPS_PER_EPOCH,
        final_learning_rate=args["min_lr"],
    )

    def rates(config, epochs):
        steps = np.asarray(epochs) * STEPS_PER_EPOCH
        return [learning_rate_schedule(config)(step) for step in steps]

    epochs = golden.arrays["lr_schedule_epochs"]
    golden.check("lr_schedule_constant", rates(constant, epochs))
    golden.check("lr_schedule_cosine", rates(cosine, epochs))
    golden.check("lrs", rates(constant, reference["step_epochs"]))


def pixels_of(config, *, seed=0):
    """A batch of two samples."""
    size = config.latent_size * VAE.stride
    images = (config.num_references,) if config.num_references > 1 else ()
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (2, *images, size, size, 3), np.uint8)
    return {"pixels": jnp.asarray(pixels), "label": jnp.array([0, 2], jnp.int32)}


def moments_of(task, batch):
    """The same batch with cached moments."""
    values = batch["pixels"]
    images = values.reshape(-1, *values.shape[-3:]) / 127.5 - 1
    encode = jax.jit(lambda params, image: task.vae.bind(params).encode(image))
    moments = encode(task.frozen()["vae"], jnp.asarray(images, jnp.float32))
    moments = moments.reshape(*values.shape[:-3], *moments.shape[1:])
    return {"moments": moments, "label": batch["label"]}


@pytest.mark.parametrize(
    "config",
    [pytest.param(MODEL, marks=pytest.mark.slow), MRAR],
    ids=["one step", "references"],
)
def test_cached_moments_give_the_loss_of_their_pixels(make_task, config):
    task = make_task(config)
    params, batch = random_params(jax.eval_shape(task.init, jax.random.key(0))), pixels_of(config)
    loss = jax.jit(task.loss)
    arguments = jax.random.key(1), task.frozen()
    value, outputs = loss(params, batch, *arguments)
    cached, _ = loss(params, moments_of(task, batch), *arguments)
    assert value == pytest.approx(float(cached), rel=1e-4)
    if config.num_references > 1:
        sums, counts = outputs["group_sums"]
        np.testing.assert_array_equal(counts, 2 * task.loss_config.copies)
        assert jnp.mean(sums / counts) == pytest.approx(float(value), rel=1e-5)


def test_number_of_images_must_fit_the_model(make_task):
    task = make_task(MRAR)
    params = jax.eval_shape(task.init, jax.random.key(0))
    with pytest.raises(ValueError, match=r"1 pixels, .*set config.data.num_references"):
        jax.eval_shape(task.loss, params, pixels_of(MODEL), jax.random.key(0), task.frozen())


def test_latents_of_another_autoencoder_are_refused(vae):
    config = dataclasses.replace(MODEL, channels=16)
    frozen = frozen_model("kl_vae", vae, Compute())
    with pytest.raises(ValueError, match=r"channels=16, but the autoencoder in .* has .*=2"):
        TransDiffKind().check_companion(config, "vae", frozen.model.config, vae)
    with pytest.raises(ValueError, match=r"image_size=16, but latents of 4x4 .* are of 8 pixels"):
        TransDiffTask(MODEL, TransDiffLossConfig(), frozen, Compute(), image_size=16)


def train_steps(task, config, count=2):
    """State before and after some steps on one batch."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    state = create_state(task, config, jax.random.key(0), mesh=mesh)
    before = jax.device_get(state.params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_train_step(task, config, shardings)
    for _ in range(count):
        state, update = step(state, pixels_of(task.model.config), task.frozen())
    return before, state, update


@pytest.mark.slow
def test_decoder_alone_is_trained_where_the_config_says_so(make_task):
    config = OptimizerConfig(warmup_steps=0, weight_decay=0.1, trained="decoder/")
    before, state, update = train_steps(make_task(), config)
    after = jax.device_get(state.params)
    jax.tree.map(np.testing.assert_array_equal, before["encoder"], after["encoder"])
    changed = [
        bool(np.any(a != b))
        for a, b in zip(*map(jax.tree.leaves, (before["decoder"], after["decoder"])), strict=True)
    ]
    assert all(changed[:1]) and sum(changed) > len(changed) // 2
    moments = optax.tree.get_all_with_path(state.opt_state, "mu")
    assert not any("encoder" in tree.flatten(mu) for _, mu in moments if isinstance(mu, dict))
    assert float(update.grad_norm.compute()) > 0


def save(task, directory):
    """Write a model directory of random weights for the task."""
    params = random_params(jax.eval_shape(task.init, jax.random.key(0)))
    model_dir.save_model(directory, "transdiff", task.model_config(), params, {})
    return params


@pytest.mark.parametrize("config", [MRAR, LARGE], ids=["references", "larger images"])
def test_fine_tuning_starts_from_a_one_step_model(make_task, config, tmp_path):
    old = save(make_task(), tmp_path / "old")
    task = make_task(config)
    like = jax.eval_shape(task.init, jax.random.key(0))
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    where = jax.tree.map(lambda _: sharding.replicated(mesh), like)
    loaded = model_dir.load_fitting(tmp_path / "old", like, where, task.adapters())
    state = create_state(
        task, OptimizerConfig(), jax.random.key(0), mesh=mesh, params=loaded.params
    )
    new, old = tree.flatten(jax.device_get(state.params)), tree.flatten(old)
    other = {name for name in old if old[name].shape != new[name].shape}
    for name in old.keys() - other:
        np.testing.assert_array_equal(new[name], old[name])
    lacking = "encoder/reference_projection/kernel (8, 16), there (2, 16)"
    assert loaded.lacking == ([lacking] if config is MRAR else [])
    assert set(loaded.adapted) == other - {"encoder/reference_projection/kernel"}
    if config is LARGE:
        assert other == {"decoder/position_table"}
        grid = new["decoder/position_table"].reshape(8, 8, 16)
        small = old["decoder/position_table"].reshape(4, 4, 16)
        # A larger grid of the same values: its mean stays, up to the clamped border.
        np.testing.assert_allclose(grid.mean((0, 1)), small.mean((0, 1)), atol=0.1)
        assert np.corrcoef(grid[1::2, 1::2].ravel(), small.ravel())[0, 1] > 0.8
    else:
        assert other == {"encoder/mask_token", "encoder/reference_projection/kernel"}
        rows = new["encoder/mask_token"]
        np.testing.assert_array_equal(rows, np.repeat(old["encoder/mask_token"], 4, axis=0))
        assert new["encoder/reference_projection/kernel"].std() > 0


def test_diversity_is_the_mean_cosine_of_all_pairs_of_tokens():
    tokens = jnp.array([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]])
    assert diversity(tokens) == pytest.approx((3 + 2) / 9)  # three of them with themselves


def test_diversity_does_not_see_the_positions(make_task):
    """The same vector everywhere has diversity 1, whatever is added to it afterwards."""
    task = make_task(diversity_weight=1.0)
    params = random_params(jax.eval_shape(task.init, jax.random.key(0)))
    norm = params["encoder"]["norm"]
    norm.update(scale=jnp.zeros_like(norm["scale"]), bias=jnp.ones_like(norm["bias"]))
    _, outputs = task.loss(params, pixels_of(MODEL), jax.random.key(0), task.frozen())
    assert float(outputs["diversity_loss"]) == pytest.approx(1.0)


def test_pictures_show_every_pass(make_task):
    task = make_task(MRAR)
    params = random_params(jax.eval_shape(task.init, jax.random.key(0)))
    (panel,) = task.pictures(params, {}, jax.random.key(0), task.frozen()).values()
    assert panel.cells.shape == (10, 4, 8, 8, 3)
    assert [*panel.header] == ["image 1", "image 2", "image 3", "image 4"]
