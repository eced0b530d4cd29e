"""The train step: the only place where parameters change.

Reading it for the first time, skip `sharding.gather`, which only says when weights that are spread
over devices are brought together; without a mesh it does nothing.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp
import optax
from clu import metrics as clu_metrics
from jax.sharding import Mesh

from dar_jax.common.flops import training_flops
from dar_jax.common.typing import Array, Params, PRNGKeyArray
from dar_jax.nn.compute import Compute
from dar_jax.nn.layout import batch_split, gradients_summed_in
from dar_jax.nn.linear import keep_parts
from dar_jax.parallel import sharding
from dar_jax.parallel.sharding import MeshConfig
from dar_jax.tasks.base import Task
from dar_jax.training import metrics
from dar_jax.training.optimizer import OptimizerConfig, make_optimizer, trained_gradients
from dar_jax.training.state import TrainState

Batch = dict[str, Array]
Gradient = tuple[Params, dict[str, Any]]
"""Float32 gradients, and the outputs of the loss."""
TrainStep = Callable[[TrainState, Batch, Params], tuple[TrainState, Any]]


def make_train_step(
    task: Task,
    config: OptimizerConfig,
    shardings: TrainState,
    *,
    accumulation: int = 1,
    gather_dtype: Any = None,
    reduce_dtype: Any = jnp.float32,
) -> TrainStep:
    """Return the jitted step `(state, batch, frozen) -> (state, metrics collection)`.

    Args:
        task: what the loss is.
        config: the optimizer.
        shardings: a `TrainState` of shardings, kept from step to step.
        accumulation: microbatches that a batch is cut into, whose gradients are averaged in
            float32. Losses that are means over the batch give the step of the whole batch; each
            microbatch draws its own randomness.
        gather_dtype: of weights that are gathered once a step; None gathers layer by layer.
        reduce_dtype: of the gradients of kernels and biases while they are summed over devices.

    The state is donated: its buffers are reused and must not be read afterwards.
    """
    dtypes = {"gather_dtype": gather_dtype, "reduce_dtype": reduce_dtype}
    grad_fn = functools.partial(gradient, task, shardings.params, **dtypes)
    step = functools.partial(train_step, task, config, grad_fn, accumulation=accumulation)
    out_shardings = (shardings, sharding.replicated(shardings.step.mesh))
    return jax.jit(step, donate_argnums=0, out_shardings=out_shardings)


def train_step(
    task: Task,
    config: OptimizerConfig,
    grad_fn: Callable[..., Gradient],
    state: TrainState,
    batch: Batch,
    frozen: Params,
    *,
    accumulation: int,
) -> tuple[TrainState, clu_metrics.Collection]:
    """Take one step; see `make_train_step`.

    A loss or gradient that is not finite is not applied: nothing changes but the step, and with it
    the learning rate, whose schedule counts steps. Adam's bias correction counts updates.

    Args:
        task: what the loss is.
        config: the optimizer.
        grad_fn: maps parameters, microbatch, key and frozen parameters to a gradient.
        state: after `state.step` updates.
        batch: of all microbatches.
        frozen: parameters that are used but not trained.
        accumulation: number of microbatches.
    """
    rng = jax.random.fold_in(state.rng, state.step)
    gradient_of = functools.partial(grad_fn, state.params, state.step, frozen)
    grads, outputs = accumulate(gradient_of, batch, rng, accumulation)
    grads = trained_gradients(config, grads)
    updates, opt_state = make_optimizer(config).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if config.ema_decay:
        # In this form, what is not trained stays as it is to the last bit.
        ema_params = jax.tree.map(
            lambda new, old: old + (1 - config.ema_decay) * (new - old), params, ema_params
        )
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(outputs["loss"]).all()
    params, ema_params, opt_state = jax.tree.map(
        lambda new, old: new if _is_schedule(new) else jnp.where(finite, new, old),
        (params, ema_params, opt_state),
        (state.params, state.ema_params, state.opt_state),
        is_leaf=_is_schedule,
    )
    state = dataclasses.replace(
        state, step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state
    )
    return state, measure(task, outputs, norm)


def _is_schedule(state: Any) -> bool:
    return isinstance(state, optax.ScaleByScheduleState)


def gradient(
    task: Task,
    shardings: Params,
    params: Params,
    step: Array,
    frozen: Params,
    batch: Batch,
    rng: PRNGKeyArray,
    *,
    gather_dtype: Any,
    reduce_dtype: Any,
) -> Gradient:
    """Differentiate the loss of a microbatch.

    Args:
        task: what the loss is.
        shardings: of the parameters.
        params: the parameters.
        step: number of completed updates.
        frozen: parameters that are used but not trained.
        batch: the microbatch.
        rng: of what the loss draws.
        gather_dtype: see `make_train_step`.
        reduce_dtype: likewise.
    """
    mesh = step_mesh(shardings)

    def loss_of(params: Params) -> tuple[Array, dict[str, Array]]:
        whole = sharding.gather(params, mesh, stacked_dtype=gather_dtype)
        if reduce_dtype == jnp.float32:
            whole = keep_parts(whole, params)
        return task.loss(whole, {**batch, "step": step}, rng, sharding.gather(frozen, mesh))

    with batch_split(sharding.batch_sharding(mesh)), gradients_summed_in(reduce_dtype):
        (loss, outputs), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    # Scatters each gradient as it is made; whole, they would fill the memory.
    grads = jax.lax.with_sharding_constraint(grads, shardings)
    return grads, {**outputs, "loss": loss}


def accumulate(
    gradient_of: Callable[[Batch, PRNGKeyArray], Gradient],
    batch: Batch,
    rng: PRNGKeyArray,
    count: int,
) -> Gradient:
    """Return the mean gradient of `count` microbatches, and their outputs stacked.

    Microbatch i takes every `count`-th image from the i-th on: a part of every device's share of
    the batch, so that no image changes its device.

    Args:
        gradient_of: maps a microbatch and a key to a gradient.
        batch: arrays whose leading axis `count` divides.
        rng: split into a key per microbatch; a single one takes it as it is.
        count: number of microbatches.
    """
    if count == 1:
        grads, outputs = gradient_of(batch, rng)
        return grads, jax.tree.map(lambda leaf: leaf[None], outputs)
    pieces = jax.tree.map(lambda x: einops.rearrange(x, "(b n) ... -> n b ...", n=count), batch)
    rngs = jax.random.split(rng, count)
    shapes, _ = jax.eval_shape(gradient_of, *jax.tree.map(lambda x: x[0], (pieces, rngs)))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def body(total: Params, piece: tuple[Batch, PRNGKeyArray]) -> tuple[Params, Any]:
        grads, outputs = gradient_of(*piece)
        return jax.tree.map(jnp.add, total, grads), outputs

    total, outputs = jax.lax.scan(body, zeros, (pieces, rngs))
    return jax.tree.map(lambda leaf: leaf / count, total), outputs


def measure(task: Task, outputs: dict[str, Any], grad_norm: Array) -> clu_metrics.Collection:
    """Collect the metrics of a step from the stacked outputs of its microbatches."""
    collection = metrics.collection(task)

    def of_microbatch(outputs: dict[str, Any]) -> clu_metrics.Collection:
        return collection.single_from_model_output(**outputs, grad_norm=grad_norm)

    return jax.vmap(of_microbatch)(outputs).reduce()


def flops_per_image(task: Task) -> float:
    """Model FLOPs of one training image, forwards and backwards, without recomputation."""
    params = jax.eval_shape(task.init, jax.random.key(0))
    batch = {**task.abstract_batch(1), "step": jax.ShapeDtypeStruct((), jnp.int32)}
    rng = jax.eval_shape(lambda: jax.random.key(0))
    return training_flops(task.loss, params, batch, rng, task.abstract_frozen())


def step_mesh(shardings: Params) -> Mesh:
    """The mesh of a tree of shardings."""
    return jax.tree.leaves(shardings)[0].mesh


def mesh_options(mesh: MeshConfig, compute: Compute) -> dict[str, Any]:
    """`gather_dtype` and `reduce_dtype` of `make_train_step`, from the configuration."""
    return {
        "gather_dtype": compute.jnp_dtype if mesh.gather == "step" else None,
        "reduce_dtype": jnp.dtype(mesh.reduce_dtype),
    }


def check_accumulation(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Raise ValueError unless every microbatch divides over the data-parallel devices."""
    if batch_size % accumulation:
        raise ValueError(
            f"batch_size {batch_size} does not divide into {accumulation} microbatches; "
            "change train.accumulation"
        )
    sharding.check_batch_size(batch_size // accumulation, mesh)
