"""The train step: the only place where parameters change."""

from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp
import optax
from clu import metrics as clu_metrics
from jax.sharding import Mesh

from dar_jax.common.typing import Array, Params, PRNGKeyArray
from dar_jax.nn.layout import batch_split
from dar_jax.parallel import sharding
from dar_jax.tasks.base import Task
from dar_jax.training import metrics
from dar_jax.training.optimizer import OptimizerConfig, make_optimizer, trained_gradients
from dar_jax.training.state import TrainState

TrainStep = Callable[[TrainState, dict[str, Array], Params], tuple[TrainState, Any]]


def make_train_step(
    task: Task,
    config: OptimizerConfig,
    shardings: TrainState,
    *,
    accumulation: int = 1,
    gather_dtype: Any = None,
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

    The state is donated: its buffers are reused and must not be read afterwards.
    """
    optimizer = make_optimizer(config)
    collection = metrics.collection(task)
    mesh = shardings.step.mesh

    def train_step(
        state: TrainState, batch: dict[str, Array], frozen: Params
    ) -> tuple[TrainState, clu_metrics.Collection]:
        def gradient(batch: dict[str, Array], rng: PRNGKeyArray) -> tuple[Params, dict[str, Any]]:
            def loss_of(params: Params) -> tuple[Array, dict[str, Array]]:
                whole = sharding.gather(params, mesh, stacked_dtype=gather_dtype)
                return task.loss(whole, batch, rng, sharding.gather(frozen, mesh))

            batch = {**batch, "step": state.step}
            with batch_split(sharding.batch_sharding(mesh)):
                (loss, outputs), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
            # Scatters each gradient as it is made; whole, they would fill the memory.
            grads = jax.lax.with_sharding_constraint(grads, shardings.params)
            return grads, {**outputs, "loss": loss}

        rng = jax.random.fold_in(state.rng, state.step)
        if accumulation == 1:
            grads, outputs = gradient(batch, rng)
            outputs = jax.tree.map(lambda leaf: leaf[None], outputs)
        else:
            grads, outputs = accumulate(gradient, batch, rng, accumulation)
        grads = trained_gradients(config, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if config.ema_decay:
            ema_params = optax.incremental_update(params, ema_params, 1 - config.ema_decay)
        state = state.replace(
            step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state
        )
        norm = optax.tree.norm(grads)

        def measure(outputs: dict[str, Any]) -> clu_metrics.Collection:
            return collection.single_from_model_output(**outputs, grad_norm=norm)

        return state, jax.vmap(measure)(outputs).reduce()

    out_shardings = (shardings, sharding.replicated(mesh))
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


def accumulate(
    gradient: Callable[[dict[str, Array], PRNGKeyArray], tuple[Params, dict[str, Any]]],
    batch: dict[str, Array],
    rng: PRNGKeyArray,
    count: int,
) -> tuple[Params, dict[str, Any]]:
    """Return the mean gradient of `count` microbatches, and their outputs stacked.

    Microbatch i takes every `count`-th image from the i-th on: a part of every device's share of
    the batch, so that no image changes its device.

    Args:
        gradient: maps a microbatch and a key to float32 gradients and outputs.
        batch: arrays whose leading axis `count` divides.
        rng: split into a key per microbatch.
        count: number of microbatches.
    """
    pieces = jax.tree.map(lambda x: einops.rearrange(x, "(b n) ... -> n b ...", n=count), batch)
    rngs = jax.random.split(rng, count)
    shapes, _ = jax.eval_shape(gradient, *jax.tree.map(lambda x: x[0], (pieces, rngs)))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def body(total: Params, piece: tuple[dict[str, Array], PRNGKeyArray]) -> tuple[Params, Any]:
        grads, outputs = gradient(*piece)
        return jax.tree.map(jnp.add, total, grads), outputs

    total, outputs = jax.lax.scan(body, zeros, (pieces, rngs))
    return jax.tree.map(lambda leaf: leaf / count, total), outputs


def check_accumulation(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Raise ValueError unless every microbatch divides over the data-parallel devices."""
    if batch_size % accumulation:
        raise ValueError(
            f"batch_size {batch_size} does not divide into {accumulation} microbatches; "
            "change train.accumulation"
        )
    sharding.check_batch_size(batch_size // accumulation, mesh)
