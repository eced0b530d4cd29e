"""Programs with abstract arguments, to be compiled without weights; and the train step's.

What a kind of model samples with stands in its entry of `kinds`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dar_jax.common.typing import Params
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.nn.stack import unstack
from dar_jax.parallel import sharding
from dar_jax.tasks.base import Task
from dar_jax.training import state as state_lib
from dar_jax.training import step as step_lib
from dar_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with abstract arguments that know their shardings.

    Attributes:
        name: for the report.
        function: what `jax.jit` returned.
        arguments: positional arguments.
        options: keyword arguments.
        images: images of one run, of all devices.
        model_flops: of one run, of all devices; None takes those of the traced program, in which
            nothing is computed twice.
    """

    name: str
    function: Callable
    arguments: tuple
    options: dict[str, Any]
    images: int
    model_flops: float | None = None


def train_program(
    task: Task,
    optimizer: OptimizerConfig,
    mesh: Mesh,
    *,
    batch_size: int,
    accumulation: int,
    **options: Any,
) -> Program:
    """The train step; see `training.step.make_train_step` for the options."""
    step_lib.check_accumulation(batch_size, accumulation, mesh)
    state = state_lib.abstract_state(task, optimizer, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = step_lib.make_train_step(
        task, optimizer, shardings, accumulation=accumulation, **options
    )
    frozen = task.abstract_frozen()
    arguments = (
        state,
        abstract(task.abstract_batch(batch_size), sharding.batch_sharding(mesh)),
        abstract(frozen, sharding.fsdp_sharding(frozen, mesh)),
    )
    model_flops = batch_size * step_lib.flops_per_image(task)
    return Program("train step", step, arguments, {}, batch_size, model_flops)


def sampling_params(
    model: FunctionalModel, mesh: Mesh, take_apart: Callable[[Params], Params] = unstack
) -> Params:
    """Abstract parameters in the compute dtype on every device, as sampling holds them.

    `take_apart` makes those of a model that is not stacked.
    """
    stacked = dataclasses.replace(model, compute=dataclasses.replace(model.compute, stacked=True))

    def create() -> Params:
        params = stacked.init(jax.random.key(0))
        params = jax.tree.map(lambda leaf: leaf.astype(model.compute.jnp_dtype), params)
        return params if model.compute.stacked else take_apart(params)

    return abstract(jax.eval_shape(create), sharding.replicated(mesh))


def over_all_devices(mesh: Mesh) -> NamedSharding:
    """Split the leading axis over all axes of the mesh, as sampling does."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of a tree with one sharding, or a tree of them."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        shardings,
    )


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes on one device; results that take the place of donated arguments count once."""
    stats = compiled.memory_analysis()
    parts = {
        "arguments": stats.argument_size_in_bytes,
        "results": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    return {**parts, "total": sum(parts.values())}
