"""The train step: EMA, randomness, and the same numbers on one device as on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dar_jax.common import image as image_lib
from dar_jax.parallel import sharding
from dar_jax.parallel.sharding import MeshConfig
from dar_jax.training.optimizer import OptimizerConfig
from dar_jax.training.state import abstract_state, create_state
from dar_jax.training.step import accumulate, check_accumulation, make_train_step
from tests.training.toy_task import ToyTask

MESH_RTOL = 2e-5
"""Sums over shards are ordered differently from sums on one device."""
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, ema_decay=0.9)


def _batches(count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        pixels = rng.integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
        yield {"pixels": pixels, "label": np.zeros(16, np.int32)}


def _run(mesh, optimizer=OPTIMIZER, steps=3, **options):
    """Return the states (as NumPy) before and after each step, the losses, the last state."""
    task = ToyTask()
    state = create_state(task, optimizer, jax.random.key(0), mesh=mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_train_step(task, optimizer, shardings, **options)
    fetch = lambda state: jax.device_get(state.replace(rng=None))  # noqa: E731
    states, losses = [fetch(state)], []
    for batch in _batches(steps):
        frozen = jax.device_put(task.frozen(), sharding.replicated(mesh))
        state, metrics = step(state, sharding.put_batch(batch, mesh), frozen)
        states.append(fetch(state))
        losses.append(float(metrics.loss.compute()))
    return states, losses, state


def _one_device():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def one_device_run():
    return _run(_one_device())


@pytest.mark.parametrize("gather_dtype", [None, jnp.float32])
def test_fsdp_on_eight_devices_equals_one_device(one_device_run, gather_dtype):
    one_states, one_losses, _ = one_device_run
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    states, losses, state = _run(mesh, gather_dtype=gather_dtype)
    np.testing.assert_allclose(losses, one_losses, rtol=MESH_RTOL)
    first_moments = [run[1].opt_state[1][0].mu["blocks"]["kernel"] for run in (states, one_states)]
    np.testing.assert_allclose(*first_moments, rtol=1e-3, atol=1e-7)
    for tree in (state.params, state.ema_params, state.opt_state[1][0].mu):
        assert tree["blocks"]["kernel"].addressable_shards[0].data.shape == (2, 128, 64)
    announced = abstract_state(ToyTask(), OPTIMIZER, mesh)
    jax.tree.map(_assert_same_sharding, state, announced)


def _assert_same_sharding(leaf, like):
    assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim), (leaf.sharding, like.sharding)


def test_ema_follows_the_parameters_from_the_first_step(one_device_run):
    states, _, _ = one_device_run
    np.testing.assert_array_equal(
        states[0].ema_params["input"]["kernel"], states[0].params["input"]["kernel"]
    )
    average = states[0].params["input"]["kernel"]
    for state in states[1:]:
        average = 0.9 * average + 0.1 * state.params["input"]["kernel"]
        np.testing.assert_allclose(state.ema_params["input"]["kernel"], average, atol=1e-6)
        assert state.eval_params is state.ema_params


def test_every_step_draws_anew_and_counts_also_without_ema():
    task = ToyTask()
    optimizer = OptimizerConfig(learning_rate=0.0, warmup_steps=0, ema_decay=0.0)
    mesh = _one_device()
    state = create_state(task, optimizer, jax.random.key(0), mesh=mesh)
    step = make_train_step(task, optimizer, jax.tree.map(lambda leaf: leaf.sharding, state))
    batch = sharding.put_batch(next(_batches(1)), mesh)
    state, first = step(state, batch, task.frozen())
    state, second = step(state, batch, task.frozen())
    assert int(state.step) == 2
    assert state.ema_params is None and state.eval_params is state.params
    assert float(first.loss.compute()) != float(second.loss.compute())
    assert jnp.isfinite(first.grad_norm.compute())


@pytest.mark.parametrize("ema_decay", [0.9, 0.0])
def test_step_that_is_not_finite_only_counts(ema_decay):
    task = ToyTask(nan_from_label=1)
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, ema_decay=ema_decay)
    mesh = _one_device()
    state = create_state(task, optimizer, jax.random.key(0), mesh=mesh)
    step = make_train_step(task, optimizer, jax.tree.map(lambda leaf: leaf.sharding, state))
    good = next(_batches(1))
    bad = {**good, "label": good["label"] + 1}
    state, _ = step(state, sharding.put_batch(good, mesh), task.frozen())
    before = jax.device_get(state.replace(rng=None, step=None))
    state, metrics = step(state, sharding.put_batch(bad, mesh), task.frozen())
    assert int(state.step) == 2 and np.isnan(metrics.loss.compute())
    counts = optax.tree.get_all_with_path(state.opt_state, "count")
    by_owner = {path[-1].tuple_name: int(count) for path, count in counts}
    assert by_owner == {"ScaleByAdamState": 1, "ScaleByScheduleState": 2}
    hidden = {"rng": None, "step": None}
    before, after = (
        s.replace(**hidden, opt_state=optax.tree.get(s.opt_state, "mu")) for s in (before, state)
    )
    jax.tree.map(np.testing.assert_array_equal, after, before)
    state, _ = step(state, sharding.put_batch(good, mesh), task.frozen())
    assert np.any(state.params["input"]["bias"] != before.params["input"]["bias"])


class PlainTask(ToyTask):
    """Without the noise: the loss of a batch is the mean over its images."""

    def loss(self, params, batch, rng, frozen):
        data = image_lib.to_float(batch["pixels"])
        error = jnp.mean((self.reconstruct(params, data) - data) ** 2)
        return error, {"mse": error}


def _gradient(accumulation, mesh, task):
    """The gradient (first moment of Adam, up to a factor) and the metrics of the first step."""
    optimizer = OptimizerConfig(clip_norm=1e9)
    state = create_state(task, optimizer, jax.random.key(0), mesh=mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_train_step(task, optimizer, shardings, accumulation=accumulation)
    batch = sharding.put_batch(next(_batches(1)), mesh)
    state, metrics = step(state, batch, task.frozen())
    return jax.device_get((optax.tree.get(state.opt_state, "mu"), metrics.compute()))


@pytest.mark.parametrize("accumulation", [2, 8])
def test_accumulated_gradient_equals_that_of_the_whole_batch(accumulation):
    mesh = sharding.make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    (whole, whole_metrics), (parts, metrics) = (
        _gradient(count, mesh, PlainTask()) for count in (1, accumulation)
    )
    largest = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(whole))
    check = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6 * largest)
    jax.tree.map(check, parts, whole)
    for name, value in whole_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6)


def test_microbatches_draw_their_own_randomness():
    def gradient(batch, rng):
        return {"mean": jnp.mean(batch["image"])}, {"draw": jax.random.normal(rng)}

    batch = {"image": jnp.arange(4.0)}
    mean, outputs = accumulate(gradient, batch, jax.random.key(0), 4)
    assert float(mean["mean"]) == 1.5
    assert len(np.unique(outputs["draw"])) == 4


def test_microbatches_that_do_not_divide_are_refused():
    mesh = sharding.make_mesh(MeshConfig(data=2), jax.devices()[:2])
    check_accumulation(16, 8, mesh)
    with pytest.raises(ValueError, match="batch_size 16 does not divide into 3 microbatches"):
        check_accumulation(16, 3, mesh)
    with pytest.raises(ValueError, match="batch_size 1 does not divide over 2"):
        check_accumulation(16, 16, mesh)
