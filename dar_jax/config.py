"""The configuration of a command: every block, read once.

A file of `configs/` makes a `ConfigDict`, the command line changes it, `build` turns it into one
frozen `Config`, which is all that everything else sees. Each block is a dataclass beside the code
that reads it and holds the defaults.
"""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import ml_collections
from ml_collections import config_dict

from dar_jax.caching.config import CacheConfig
from dar_jax.common import addresses, config_build
from dar_jax.common.checks import check_seed
from dar_jax.convert.config import ConvertConfig
from dar_jax.data.base import READING_KEYS, DataConfig
from dar_jax.demo.config import DemoConfig
from dar_jax.evaluation.config import EvaluateConfig
from dar_jax.generation.config import SampleConfig, sampling_fields
from dar_jax.kinds import find_kind
from dar_jax.nn.compute import Compute
from dar_jax.parallel.sharding import MeshConfig
from dar_jax.performance.config import BenchmarkConfig, CompileConfig
from dar_jax.serving.config import ServeConfig
from dar_jax.training.config import TrainConfig
from dar_jax.training.optimizer import OptimizerConfig
from dar_jax.training.tracking import WandbConfig

if TYPE_CHECKING:
    ConfigDict = Any  # ml_collections declares no keys, and takes any key for any type it may hold
else:
    ConfigDict = ml_collections.ConfigDict

ROOT = "config"
"""What keys begin with on the command line."""


def _bound(cls: type, *, but: tuple[str, ...] = ()) -> Any:
    """A block that a checkpoint is bound to, except for the keys in `but`."""
    return dataclasses.field(default_factory=cls, metadata={"bound": True, "but": but})


def _free(cls: type) -> Any:
    """A block that may change between a checkpoint and the run that resumes from it."""
    return dataclasses.field(default_factory=cls, metadata={"bound": False})


@dataclasses.dataclass(frozen=True)
class Config:
    """All that a command is told.

    Attributes:
        task: kind of the model that is trained, see `dar_jax.kinds`; empty where a command needs
            none.
        model: its architecture, of the kind's class; None without a task.
        loss: of the kind's class; None if it has none.
        companions: paths of the frozen models that training needs; keys of their own names in a
            config file, such as `config.tokenizer`.
        seed: of training.
    """

    task: str = ""
    model: Any = None
    loss: Any = None
    companions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seed: int = 0
    compute: Compute = _free(Compute)
    data: DataConfig = _bound(DataConfig, but=READING_KEYS)
    optimizer: OptimizerConfig = _bound(OptimizerConfig)
    train: TrainConfig = _bound(
        TrainConfig,
        but=tuple(f.name for f in dataclasses.fields(TrainConfig) if f.name != "init_from"),
    )
    mesh: MeshConfig = _free(MeshConfig)
    sample: SampleConfig = _free(SampleConfig)
    evaluate: EvaluateConfig = _free(EvaluateConfig)
    cache: CacheConfig = _free(CacheConfig)
    convert: ConvertConfig = _free(ConvertConfig)
    compile: CompileConfig = _free(CompileConfig)
    benchmark: BenchmarkConfig = _free(BenchmarkConfig)
    wandb: WandbConfig = _free(WandbConfig)
    demo: DemoConfig = _free(DemoConfig)
    serve: ServeConfig = _free(ServeConfig)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON types, in the layout of a config file."""
        values = dataclasses.asdict(self)
        options = values["sample"].pop("options")
        values["sample"] |= options
        values |= values.pop("companions")
        return {name: value for name, value in values.items() if value is not None}

    def bound(self) -> dict[str, Any]:
        """What has to be the same in a run that resumes, as JSON types."""
        values = {"task": self.task, "seed": self.seed, **self.companions}
        for name, block, but in self._bound_blocks():
            block = dataclasses.asdict(block)
            values[name] = {key: value for key, value in block.items() if key not in but}
        return values

    def bound_defaults(self) -> dict[str, Any]:
        """Defaults of `bound`: what a checkpoint holds to that is older than a key."""
        return {
            name: config_build.defaults_of(type(block)) for name, block, _ in self._bound_blocks()
        }

    def _bound_blocks(self) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
        """Name, block, and its keys that may change."""
        for name in ("model", "loss"):
            if (block := getattr(self, name)) is not None:
                yield name, block, ()
        for field in dataclasses.fields(self):
            if field.metadata.get("bound"):
                yield field.name, getattr(self, field.name), field.metadata["but"]


_TYPES = typing.get_type_hints(Config)
BLOCKS: dict[str, type] = {
    field.name: _TYPES[field.name]
    for field in dataclasses.fields(Config)
    if "bound" in field.metadata
}
"""Class of every block that does not depend on the task, by name."""


def build(config: ConfigDict) -> Config:
    """Read a configuration.

    Raises:
        ValueError: an unknown key (with the nearest one), a missing one, or a value that its block
            refuses; named as on the command line.
    """
    values = config.to_dict()
    addresses.check_config(values, ROOT)
    task = config_build.read_value(str, values.pop("task", ""), f"{ROOT}.task")
    blocks: dict[str, Any] = {}
    companions = {}
    if task:
        kind = find_kind(task, f"{ROOT}.task={task!r}")
        blocks["model"] = _block(kind.architecture, values.pop("model", {}), "model")
        config_build.check_sizes(blocks["model"], f"{ROOT}.model")
        if kind.loss is not None:
            blocks["loss"] = _block(kind.loss, values.pop("loss", {}), "loss")
        for name in kind.frozen:
            if not isinstance(values.get(name), str):
                raise ValueError(f"{ROOT}.{name} is missing: name the model directory of a {name}")
            companions[name] = values.pop(name)
    seed = values.pop("seed", 0)
    if type(seed) is not int:
        raise ValueError(f"{ROOT}.seed: expected int, got {seed!r}")
    check_seed(f"{ROOT}.seed", seed)
    config_build.check_keys(values, [*BLOCKS, "task", "seed", *blocks, *companions], ROOT)
    blocks |= {name: _block(BLOCKS[name], block, name) for name, block in values.items()}
    return Config(task=task, companions=companions, seed=seed, **blocks)


def _block(cls: type, values: Any, name: str) -> Any:
    where = f"{ROOT}.{name}"
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected a block of keys, got {values!r}")
    if cls is SampleConfig:
        values = _with_options(values)
    return config_build.build(cls, values, where)


def _with_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Gather the options of the kinds that are set."""
    fields = sampling_fields()
    own = {name: value for name, value in values.items() if name not in fields}
    config_build.check_keys(own, [*fields, *_names(SampleConfig)], f"{ROOT}.sample")
    options = {
        name: config_build.read_value(fields[name], value, f"{ROOT}.sample.{name}")
        for name, value in values.items()
        if name in fields and value is not None
    }
    # A block is always there: one that nobody has touched is no option that is set.
    untouched = [name for name, value in options.items() if value == _default_block(fields[name])]
    return {**own, "options": {k: v for k, v in options.items() if k not in untouched}}


def _default_block(annotation: Any) -> Any:
    """The block that stands in a config for an option that is a dataclass; None for others."""
    is_block = isinstance(annotation, type) and dataclasses.is_dataclass(annotation)
    return annotation() if is_block else None


def _names(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def defaults() -> ConfigDict:
    """What every file of `configs/` begins with: the blocks that do not depend on the task."""
    config: ConfigDict = ml_collections.ConfigDict({"task": "", "seed": 0})
    for name, cls in BLOCKS.items():
        config[name] = block(cls())
    del config.sample.options
    for name, annotation in sampling_fields().items():
        default = _default_block(annotation)
        config.sample[name] = (
            config_dict.placeholder(_flag_type(annotation)) if default is None else block(default)
        )
    return config


def block(instance: Any) -> ConfigDict:
    """Return a config block with the fields of a dataclass instance.

    A field that is None knows its type, so that it can be set on the command line.
    """
    hints = typing.get_type_hints(type(instance))
    values = ml_collections.ConfigDict()
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if dataclasses.is_dataclass(value):
            value = block(value)
        elif value is None:
            value = config_dict.placeholder(_flag_type(hints[field.name]))
        values[field.name] = value
    return values


def _flag_type(annotation: Any) -> type:
    """The plain type of an annotation such as `tuple[int, ...] | None`."""
    annotation = config_build.without_none(annotation)
    return typing.get_origin(annotation) or annotation
