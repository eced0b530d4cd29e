"""What every config holds; the defaults are those of the dataclasses that the blocks become."""

import dataclasses

import ml_collections

from dar_jax.data.sources import DataConfig
from dar_jax.evaluation.evaluators import EvaluateConfig
from dar_jax.modes.benchmark import BenchmarkConfig
from dar_jax.modes.cache import CacheConfig
from dar_jax.modes.compile import CompileConfig
from dar_jax.modes.convert import ConvertConfig
from dar_jax.modes.demo import DemoConfig
from dar_jax.modes.sample import SampleConfig
from dar_jax.nn.compute import Compute
from dar_jax.parallel.sharding import MeshConfig
from dar_jax.training.config import TrainConfig
from dar_jax.training.optimizer import OptimizerConfig
from dar_jax.training.tracking import WandbConfig


def block(instance) -> ml_collections.ConfigDict:
    """Return a config block with the fields of a dataclass instance."""
    return ml_collections.ConfigDict(dataclasses.asdict(instance))


def base() -> ml_collections.ConfigDict:
    """Return the blocks that do not depend on the task."""
    return ml_collections.ConfigDict(
        dict(
            seed=0,
            compute=block(Compute()),
            data=block(DataConfig()),
            optimizer=block(OptimizerConfig()),
            train=block(TrainConfig()),
            mesh=block(MeshConfig()),
            sample=block(SampleConfig()),
            evaluate=block(EvaluateConfig()),
            cache=block(CacheConfig()),
            convert=block(ConvertConfig()),
            compile=block(CompileConfig()),
            benchmark=block(BenchmarkConfig()),
            wandb=block(WandbConfig()),
            demo=block(DemoConfig()),
        )
    )


def variant(name: str, variants: dict[str, object]):
    """Return the variant called `name`.

    Raises:
        ValueError: there is none.
    """
    if name not in variants:
        raise ValueError(f"unknown config variant {name!r}; available: {', '.join(variants)}")
    return variants[name]
