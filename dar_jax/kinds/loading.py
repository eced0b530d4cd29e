"""From paths and configurations to tasks and pipelines, for every kind alike."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import jax
from absl import logging
from jax.sharding import Mesh

from dar_jax.common import model_dir
from dar_jax.common.compiled import once
from dar_jax.common.config_build import build, check_sizes
from dar_jax.common.typing import Any
from dar_jax.data.base import DataConfig
from dar_jax.data.sources import load_source
from dar_jax.kinds import find_kind
from dar_jax.kinds.base import Kind
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.nn.fused_attention import check_device
from dar_jax.parallel.sharding import fsdp_sharding
from dar_jax.pipelines.base import BATCH_SIZE, Autoencoder, Pipeline
from dar_jax.tasks.base import FrozenModel, Task


class Opened(NamedTuple):
    """A model directory whose weights are not read yet.

    Attributes:
        path: of the directory.
        kind: of the model.
        architecture: of the kind's class.
        class_names: of the classes that have a name.
        sampling: options that it is best used with, of the kind's class; None if it has none.
        batch_size: images that it is best used on at a time.
    """

    path: pathlib.Path
    kind: Kind
    architecture: Any
    class_names: tuple[str, ...]
    sampling: Any
    batch_size: int


@runtime_checkable
class TaskBlocks(Protocol):
    """What a task is built from: fields of `dar_jax.config.Config`.

    Attributes:
        task: name of a kind.
        model: architecture of its class.
        loss: of its class.
        companions: paths of the frozen models that it needs, by name.
        compute: execution choices.
        data: what it is trained on.
    """

    @property
    def task(self) -> str: ...
    @property
    def model(self) -> Any: ...
    @property
    def loss(self) -> Any: ...
    @property
    def companions(self) -> Mapping[str, str]: ...
    @property
    def compute(self) -> Compute: ...
    @property
    def data(self) -> DataConfig: ...


def open_model(path: str | os.PathLike, kind: str | None = None) -> Opened:
    """Read the config of a model directory; no weights are read.

    Args:
        path: as `model_dir.locate` takes it.
        kind: that it must be of.

    Raises:
        ValueError: no such directory, or an unknown or another kind.
    """
    directory = model_dir.locate(path)
    loaded = model_dir.load_config(directory, kind)
    found = find_kind(loaded["kind"], str(path))
    architecture = build(found.architecture, loaded["model"], str(directory))
    check_sizes(architecture, str(directory))
    sampling = found.sampling and build(
        found.sampling, loaded.get("sampling", {}), f"{directory}: sampling"
    )
    class_names = loaded.get("class_names", [])
    if not isinstance(class_names, list) or not all(isinstance(n, str) for n in class_names):
        raise ValueError(f"{directory}: class_names must be a list of names")
    batch_size = loaded.get("batch_size", BATCH_SIZE)
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"{directory}: batch_size={batch_size!r} must be an integer of at least 1")
    return Opened(directory, found, architecture, tuple(class_names), sampling, batch_size)


def from_pretrained(
    path: str | os.PathLike, *, compute: Compute | None = None, mesh: Mesh | None = None
) -> Pipeline | Autoencoder:
    """Load a model directory; its kind is read from `config.json`.

    Args:
        path: directory with `config.json` and `model.safetensors` (and the models that it needs),
            a workdir that holds it as `model`, an address in a bucket, `hf://owner/name[/directory]`,
            or what comes with the package: `package://` and `mnist`, `emoji` or `emoji_text`.
        compute: execution choices, e.g. `Compute(dtype="bfloat16")`, which draws in bfloat16 and
            decodes in float32.
        mesh: spread parameters and batches over these devices; each one reads its own part only.

    Raises:
        ValueError: no such directory, an unknown kind, weights that do not fit the config, or an
            attention that the devices do not have.
    """
    if not isinstance(compute, Compute | None):
        raise ValueError(f"compute={compute!r} must be an instance of dar_jax.Compute")
    directory, kind, architecture, class_names, sampling, batch_size = open_model(path)
    compute = compute or Compute()
    check_device(compute, jax.devices())
    if mesh is not None and list(mesh.devices.flat) == jax.local_devices()[:1]:
        mesh = None  # arrays that are bound to no device suit programs that were compiled ahead
    model = FunctionalModel(kind.module, architecture, kind.compute_of(compute))
    like = model.abstract_params()
    shardings = None if mesh is None else fsdp_sharding(like, mesh)
    params = model_dir.load_params(directory, like, shardings)
    companions = {}
    for name, companion_kind in kind.companions.items():
        nested = model_dir.companion(directory, name)
        model_dir.load_config(nested, companion_kind)
        companions[name] = from_pretrained(nested, compute=compute, mesh=mesh)
        kind.check_companion(architecture, name, companions[name].config, str(nested))
    pipeline = kind.make_pipeline(
        model,
        params,
        companions=companions,
        class_names=class_names,
        mesh=mesh,
    )
    pipeline.sampling, pipeline.batch_size = sampling, batch_size
    if isinstance(pipeline, Autoencoder):
        pipeline.directory = directory
    return pipeline


def random_pipeline(config: TaskBlocks, *, seed: int = 0) -> Pipeline | Autoencoder:
    """Make the pipeline of a configuration with random weights; nothing is read but configs.

    Raises:
        ValueError: the models do not fit each other.
    """
    kind = find_kind(config.task, "config.task")
    companions = {}
    for name, companion_kind in kind.companions.items():
        other = find_kind(companion_kind, kind.name)
        architecture = _architecture(other, config.companions[name])
        kind.check_companion(config.model, name, architecture, config.companions[name])
        model = FunctionalModel(other.module, architecture, other.compute_of(config.compute))
        params = jax.jit(model.init, compiler_options=once())(jax.random.key(seed))
        companions[name] = other.make_pipeline(model, params, companions={})
    model = FunctionalModel(kind.module, config.model, kind.compute_of(config.compute))
    params = jax.jit(model.init, compiler_options=once())(jax.random.key(seed))
    return kind.make_pipeline(model, params, companions=companions)


def build_task(config: TaskBlocks, *, with_weights: bool = True) -> Task:
    """Build the task of a configuration.

    Args:
        config: its blocks.
        with_weights: read the frozen models' weights. Without them their architectures are read, or
            the released ones taken where there is not a model yet, and nothing but shapes is known:
            for compiling.

    Raises:
        ValueError: an unknown task, models or data that do not fit it, or a model that cannot be
            read.
    """
    kind = find_kind(config.task, "config.task")
    model = _with_classes(config.model, config.data)
    companions = {
        name: frozen_model(
            companion_kind,
            config.companions[name],
            config.compute,
            with_weights=with_weights,
        )
        for name, companion_kind in kind.frozen.items()
    }
    for name, companion in companions.items():
        kind.check_companion(model, name, companion.model.config, config.companions[name])
    if with_weights:
        kind.check_data(model, config.data, config.companions)
    return kind.task(
        model, config.loss, compute=config.compute, data=config.data, companions=companions
    )


def frozen_model(
    kind: str, path: str, compute: Compute, *, with_weights: bool = True
) -> FrozenModel:
    """Read a model that is used and not trained.

    Args:
        kind: that it must be of.
        path: as `model_dir.locate` takes it.
        compute: all execution choices.
        with_weights: see `build_task`.

    Raises:
        ValueError: there is no such model, or its parameters do not fit its config.
    """
    found = find_kind(kind, path)
    compute = found.compute_of(compute)
    if not with_weights:
        model = FunctionalModel(found.module, _architecture(found, path), compute)
        return FrozenModel(model, model.abstract_params())
    opened = open_model(path, kind)
    model = FunctionalModel(found.module, opened.architecture, compute)
    return FrozenModel(model, model_dir.load_params(opened.path, model.abstract_params()))


def _architecture(kind: Kind, path: str) -> Any:
    """Return the architecture of a model, or the released one where there is not a model yet."""
    if model_dir.locate(path).exists():
        return open_model(path, kind.name).architecture
    if kind.released is None:
        raise ValueError(f"{path} does not exist: name the model directory of {kind.noun}")
    logging.info("%s does not exist: taking the released architecture of %s", path, kind.noun)
    return kind.released


def _with_classes(model: Any, data: DataConfig) -> Any:
    """Take the number of classes from the data where the config leaves it open."""
    if getattr(model, "num_classes", None) != 0:
        return model
    return dataclasses.replace(model, num_classes=load_source(data, "train").num_classes)
