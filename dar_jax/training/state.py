"""The train state: everything that a step reads and writes, and all that a checkpoint holds
besides the position in the data."""

import json
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from dar_jax.common import model_dir, tree
from dar_jax.common.compiled import once
from dar_jax.common.typing import Params, PRNGKeyArray
from dar_jax.parallel import sharding
from dar_jax.tasks.base import Task
from dar_jax.training.optimizer import OptimizerConfig, check_names, make_optimizer


@flax.struct.dataclass
class TrainState:
    """State after `step` completed updates; parameters and their average are float32.

    The fields are `Any` because the same structure also holds shapes, shardings and whatever
    placeholders `jax.jit` maps over it.
    """

    step: Any
    """int32 scalar."""
    params: Any
    ema_params: Any
    """As `params`, or None where no average is kept."""
    opt_state: Any
    rng: Any
    """Typed key of the run; a step draws from `fold_in(rng, step)`, so it never changes."""

    @property
    def eval_params(self) -> Params:
        """The averaged parameters, or the parameters where no average is kept."""
        return self.params if self.ema_params is None else self.ema_params


def abstract_state(task: Task, config: OptimizerConfig, mesh: Mesh) -> TrainState:
    """Return the `TrainState` of `ShapeDtypeStruct`s with shardings; nothing is computed.

    Raises:
        ValueError: see `optimizer.check_names`.
    """
    shapes = jax.eval_shape(_creator(task, config), jax.random.key(0))
    check_names(config, shapes.params)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        sharding.fsdp_sharding(shapes, mesh),
    )


def create_state(
    task: Task,
    config: OptimizerConfig,
    rng: PRNGKeyArray,
    *,
    mesh: Mesh,
    params: Params | None = None,
) -> TrainState:
    """Initialise the whole state in one program, each array directly in its shards.

    Args:
        task: draws the parameters.
        config: the optimizer.
        rng: of the run.
        mesh: where the state lies.
        params: start from these, already in their shards, instead of the drawn ones of their names.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(task, config, mesh))
    create = jax.jit(_creator(task, config), out_shardings=shardings, compiler_options=once())
    return create(rng, params)


def _creator(task: Task, config: OptimizerConfig):
    def create(rng: PRNGKeyArray, params: Params | None = None) -> TrainState:
        init_rng, step_rng = jax.random.split(rng)
        given = tree.flatten(params or {})
        start = jax.tree_util.tree_map_with_path(
            lambda path, leaf: given.get(sharding.leaf_name(path), leaf), task.init(init_rng)
        )
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=start,
            ema_params=start if config.ema_decay else None,
            opt_state=make_optimizer(config).init(start),
            rng=step_rng,
        )

    return create


def load_initial(path: str, kind: str, task: Task, abstract: TrainState) -> Params:
    """Load the parameters that a new run starts from; log what is drawn anew, and what differs.

    Args:
        path: of a model directory, as `model_dir.locate` takes it.
        kind: that it must be of.
        task: that is trained.
        abstract: state of the run.

    Raises:
        ValueError: there is no such model, or less than half of its parameters fit.
    """
    directory = model_dir.locate(path)
    there = tree.flatten(model_dir.load_config(directory, kind)["model"])
    here = tree.flatten(json.loads(json.dumps(task.model_config())))
    like = task.released(abstract.params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    fitting = model_dir.load_fitting(directory, like, shardings, task.adapters())
    parts = {
        "set otherwise": [
            f"{name} {value}, there {there[name]}"
            for name, value in here.items()
            if there.get(name, value) != value
        ],
        "made to fit": fitting.adapted,
        "drawn anew": fitting.lacking or ["nothing"],
        "not used": fitting.unused,
    }
    lines = ["\n  ".join([f"{title}:", *names]) for title, names in parts.items() if names]
    count = len(jax.tree.leaves(fitting.params)) - len(fitting.adapted)
    text = "\n".join(lines)
    logging.info("%d tensors of %s are taken as they are\n%s", count, directory, text)
    return fitting.params
