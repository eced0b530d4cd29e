"""The train step of a configuration as a program, and `compute.remat=auto`, which compiles it."""

import dataclasses
from typing import Any, Protocol, TypeVar, runtime_checkable

from jax.sharding import Mesh

from dar_jax.kinds.loading import TaskBlocks, build_task
from dar_jax.nn.compute import Compute
from dar_jax.parallel.sharding import MeshConfig
from dar_jax.performance.programs import Program, train_program
from dar_jax.performance.recomputation import choose_remat
from dar_jax.training.config import TrainConfig
from dar_jax.training.optimizer import OptimizerConfig
from dar_jax.training.step import mesh_options


@runtime_checkable
class TrainBlocks(TaskBlocks, Protocol):
    """The blocks of a `Config` that a train step is made from."""

    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def mesh(self) -> MeshConfig: ...


C = TypeVar("C", bound=TrainBlocks)


def train_step(config: TrainBlocks, mesh: Mesh) -> Program:
    """Return the train step with abstract arguments; no weights are read."""
    return train_program(
        build_task(config, with_weights=False),
        config.optimizer,
        mesh,
        batch_size=config.data.batch_size,
        accumulation=config.train.accumulation,
        **mesh_options(config.mesh, config.compute),
    )


def with_remat(config: C, mesh: Mesh, memory: float | int | None) -> C:
    """Decide `compute.remat=auto` for devices with so many bytes of memory, or one unknown."""

    def of(compute: Compute) -> Program:
        return train_step(_replace(config, compute), mesh)

    platform = mesh.devices.flat[0].platform
    return _replace(config, choose_remat(config.compute, of, memory, platform))


def _replace(config: Any, compute: Compute) -> Any:
    return dataclasses.replace(config, compute=compute)
