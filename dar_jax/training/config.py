"""What the training loop reads of a configuration."""

import dataclasses
from typing import Any

import ml_collections

from dar_jax.common import config_build as config_lib
from dar_jax.data import sources
from dar_jax.nn.compute import Compute
from dar_jax.parallel import sharding
from dar_jax.training.optimizer import OptimizerConfig
from dar_jax.training.tracking import WandbConfig

UNBOUND_BLOCKS = (
    *("train", "mesh", "compute", "sample", "evaluate"),
    *("cache", "convert", "compile", "benchmark", "demo", "wandb"),
)
"""Blocks that may change between a checkpoint and the run that resumes from it."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length and rhythm of a run; all counts are steps."""

    steps: int = 10_000
    log_every: int = 100
    checkpoint_every: int = 1_000
    keep_checkpoints: int = 3
    keep_every: int = 0
    """Checkpoints of multiples of this step are kept as well as the latest ones; 0: none."""
    init_from: str = ""
    """Model directory (or workdir, or hf:// address) whose parameters a new run starts from."""
    image_every: int = 1_000
    """0: no pictures."""
    evaluate_every: int = 0
    """Evaluate as `config.evaluate` says; 0: never. See `evaluation.during_training`."""
    accumulation: int = 1
    """Microbatches per step, one after the other: the same step with less memory."""
    profile_steps: tuple[int, ...] = ()
    """First and last step to record with `jax.profiler` to WORKDIR/profile; empty: none."""

    def __post_init__(self):
        if self.profile_steps and not (
            len(self.profile_steps) == 2 and 1 <= self.profile_steps[0] <= self.profile_steps[1]
        ):
            raise ValueError(
                f"profile_steps {self.profile_steps} must be a first and a last step, e.g. (10, 12)"
            )
        for name in ("steps", "log_every", "checkpoint_every", "keep_checkpoints", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not positive")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The blocks of the configuration that the loop itself reads."""

    data: sources.DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    mesh: sharding.MeshConfig
    compute: Compute
    wandb: WandbConfig
    seed: int

    @property
    def step_options(self) -> dict[str, Any]:
        """Keyword arguments of `make_train_step`."""
        once = self.mesh.gather == "step"
        dtype = self.compute.jnp_dtype if once else None
        return {"accumulation": self.train.accumulation, "gather_dtype": dtype}


def parse(config: ml_collections.ConfigDict) -> Settings:
    """Turn the loop's blocks into dataclasses; an absent block keeps its defaults."""

    def block(cls: type, name: str) -> Any:
        return config_lib.build(cls, config.to_dict().get(name, {}), f"config.{name}")

    return Settings(
        data=block(sources.DataConfig, "data"),
        optimizer=block(OptimizerConfig, "optimizer"),
        train=block(TrainConfig, "train"),
        mesh=block(sharding.MeshConfig, "mesh"),
        compute=block(Compute, "compute"),
        wandb=block(WandbConfig, "wandb"),
        seed=config.seed,
    )


def bound_config(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Return what has to be the same in a run that resumes."""
    bound = {name: v for name, v in config.to_dict().items() if name not in UNBOUND_BLOCKS}
    data = {name: v for name, v in bound["data"].items() if name not in sources.READING_KEYS}
    return {**bound, "data": data}
