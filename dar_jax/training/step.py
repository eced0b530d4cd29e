"""The train step: the only place where parameters change."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from clu import metrics as clu_metrics

from dar_jax.common.typing import Array, Params
from dar_jax.tasks.base import Task
from dar_jax.training import metrics, sharding
from dar_jax.training.optimizer import OptimizerConfig, make_optimizer
from dar_jax.training.state import TrainState

TrainStep = Callable[[TrainState, dict[str, Array], Params], tuple[TrainState, Any]]


def make_train_step(task: Task, config: OptimizerConfig, shardings: TrainState) -> TrainStep:
    """Return the jitted step `(state, batch, frozen) -> (state, metrics collection)`.

    Args:
        task: what the loss is.
        config: the optimizer.
        shardings: a `TrainState` of shardings, kept from step to step.

    The state is donated: its buffers are reused and must not be read afterwards.
    """
    optimizer = make_optimizer(config)
    collection = metrics.collection(task)

    def train_step(
        state: TrainState, batch: dict[str, Array], frozen: Params
    ) -> tuple[TrainState, clu_metrics.Collection]:
        rng = jax.random.fold_in(state.rng, state.step)
        gradient = jax.value_and_grad(task.loss, has_aux=True)
        (loss, outputs), grads = gradient(state.params, batch, rng, frozen)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if config.ema_decay:
            ema_params = optax.incremental_update(params, ema_params, 1 - config.ema_decay)
        state = state.replace(
            step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state
        )
        measured = {**outputs, "loss": loss, "grad_norm": optax.tree.norm(grads)}
        return state, collection.single_from_model_output(**measured)

    out_shardings = (shardings, sharding.replicated(shardings.step.mesh))
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)
