"""What everything else asks of a kind of model.

A *kind* is what `config.task` and the `kind` of a model directory name. All that depends on it
stands in its one entry: classes, task, pipeline, options of sampling, the models that it needs
beside it, conversion, what is compiled ahead of time and what is timed.
"""

import abc
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from flax import nnx
from jax.sharding import Mesh

from dar_jax.common.typing import Any, Params
from dar_jax.convert.checkpoints import Checkpoint
from dar_jax.data.base import DataConfig
from dar_jax.data.sources import check_pictures
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.performance.programs import Program
from dar_jax.performance.runs import Runs
from dar_jax.pipelines.base import Autoencoder, ModelPipeline, Pipeline
from dar_jax.tasks.base import FrozenModel, Task

C = TypeVar("C")


class Kind(abc.ABC, Generic[C]):
    """One kind of model; `C` is the dataclass of its architecture.

    Attributes:
        name: of the kind.
        noun: what messages call such a model, with its article.
        module: class of the module.
        architecture: dataclass of its config, the block `model`.
        released: the published architecture, if this is what another kind needs: for compiling
            that one where there is not a model yet.
        loss: dataclass of the block `loss`; None if there is nothing to choose.
        pipeline: class of what `from_pretrained` returns.
        companions: kinds of the frozen models that this one needs, by the name of the config key
            that holds the path, and of the subdirectory of the model directory.
        teachers: likewise, of models that only its training needs.
        trains: name of the kind whose models it trains in a way of its own; empty: its own.
        runs: what `--mode=benchmark` times; None if the kind draws no images.
        caches: data sources of encoded pictures that it learns from as well.
        takes_references: whether it learns from several pictures of a class at a time.
    """

    name: str
    noun: str
    module: type[nnx.Module]
    architecture: type[C]
    released: C | None = None
    loss: type | None = None
    pipeline: type[Pipeline] | type[Autoencoder]
    companions: Mapping[str, str] = types.MappingProxyType({})
    teachers: Mapping[str, str] = types.MappingProxyType({})
    trains: str = ""
    runs: type[Runs] | None = None
    caches: tuple[str, ...] = ()
    takes_references: bool = False

    @property
    def frozen(self) -> dict[str, str]:
        """Kinds of all frozen models, by the name of the config key that holds the path."""
        return {**self.companions, **self.teachers}

    @property
    def released_kind(self) -> str:
        """Name of the kind of its model directories."""
        return self.trains or self.name

    @property
    def sampling(self) -> type | None:
        """Dataclass of how images are drawn, from the block `sample`; None if nothing is."""
        return self.pipeline.sampling_class

    @property
    def draws_images(self) -> bool:
        """Whether it makes images of class labels."""
        return issubclass(self.pipeline, Pipeline)

    @property
    def has_likelihood(self) -> bool:
        """Whether it says how likely an image is."""
        return issubclass(self.pipeline, Pipeline) and self.pipeline.has_likelihood

    def compute_of(self, compute: Compute) -> Compute:
        """Execution choices of such a model where it is not being trained, given all choices."""
        return compute if self.draws_images else compute.of_decoding()

    @abc.abstractmethod
    def task(
        self,
        model: C,
        loss: Any,
        *,
        compute: Compute,
        data: DataConfig,
        companions: Mapping[str, FrozenModel],
    ) -> Task:
        """Build the task that trains it.

        Args:
            model: the architecture.
            loss: of the class `loss`.
            compute: execution choices.
            data: what it is trained on.
            companions: the frozen models, by name.

        Raises:
            ValueError: they do not fit each other.
        """

    @abc.abstractmethod
    def make_pipeline(
        self,
        model: FunctionalModel,
        params: Params,
        *,
        companions: Mapping[str, ModelPipeline],
        class_names: Sequence[str] = (),
        mesh: Mesh | None = None,
    ) -> Pipeline | Autoencoder:
        """Put a model and its companions together."""

    def check_companion(self, model: C, name: str, companion: Any, where: str) -> None:
        """Raise ValueError unless a companion suits the model.

        Args:
            model: the architecture.
            name: of the companion.
            companion: its architecture.
            where: its path.
        """

    def check_data(self, model: C, data: DataConfig, paths: Mapping[str, str]) -> None:
        """Raise ValueError unless models of this kind can learn from the data.

        Args:
            model: the architecture.
            data: where pictures, or what a cache holds of them, come from.
            paths: of the companions, which a cache has to be made with.
        """
        if data.source not in self.caches:
            check_pictures(data)
        if data.num_references > 1 and not self.takes_references:
            raise ValueError(
                f"config.data.num_references={data.num_references}, but {self.noun} learns from "
                "one picture at a time: set it to 1"
            )

    @abc.abstractmethod
    def from_reference(self, checkpoint: Checkpoint, model: C) -> tuple[C, Params, Sequence[str]]:
        """Convert an official checkpoint.

        Args:
            checkpoint: what the file holds.
            model: the architecture of the config, which one that the file carries replaces.

        Returns:
            The architecture, the parameters, and patterns of the keys that are not parameters.

        Raises:
            ValueError: keys or shapes that do not fit.
        """

    @abc.abstractmethod
    def to_reference(self, params: Params, model: C) -> dict[str, Any]:
        """Return the state dict that the reference implementation loads."""

    def programs(self, task: Task, mesh: Mesh, images: int) -> Iterator[Program]:
        """Yield what sampling runs over and over, for `images` images; nothing is computed."""
        del task, mesh, images
        yield from ()
