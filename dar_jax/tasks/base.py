"""What the trainer asks of a task, and what most tasks answer.

Tasks draw all randomness and pass it in to the models.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import numpy as np
from clu import metrics

from dar_jax.common import model_dir
from dar_jax.common.config_build import build
from dar_jax.common.typing import Any, Array, Params, PRNGKeyArray
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel

DISCRIMINATOR = "discriminator"
"""Subtree of the trained parameters that has an optimizer of its own: the judge of an adversarial
loss, which `released` leaves out."""

Adapter = Callable[[np.ndarray, tuple[int, ...]], np.ndarray | None]
"""Makes a parameter of another shape fit, as far as it can; None leaves it to `init`."""


@runtime_checkable
class Task(Protocol):
    """What a batch, a loss and a picture are; pure functions of the parameters.

    A batch is `{"pixels": uint8 [B, H, W, 3], "label": int32 [B]}`, or has "codes" (see
    `data.codes`) instead of pixels; `loss` also gets "step", the number of completed updates.
    """

    kind: str
    """Name in the model directory's `config.json`."""

    @property
    def flops_per_image(self) -> float:
        """Model FLOPs of one training image, forward and backward, without recomputation."""

    def init(self, rng: PRNGKeyArray) -> Params:
        """Draw the trained parameters."""

    def frozen(self) -> Params:
        """Load the parameters of nets that are used but not trained; an argument of every step.

        Raises:
            ValueError: they cannot be had; the message says how to get them.
        """

    def abstract_frozen(self) -> Params:
        """Shapes and dtypes of `frozen`; nothing is loaded."""

    def loss(
        self, params: Params, batch: Mapping[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> tuple[Array, dict[str, Array]]:
        """Return the scalar loss (mean over the batch) and what the metrics are made from."""

    def metrics(self) -> dict[str, type[metrics.Metric]]:
        """Metric classes by name, fed with the outputs of `loss`."""

    def pictures(
        self, params: Params, batch: Mapping[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> dict[str, np.ndarray]:
        """Draw uint8 [H, W, 3] pictures from averaged parameters and a held-out batch."""

    def figures(
        self, params: Params, batch: Mapping[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> dict[str, float]:
        """Measure the same on the same batch; names as they are logged below `eval/`."""

    def released(self, params: Params) -> Params:
        """Return the part of the parameters that the model directory holds."""

    def model_config(self) -> dict[str, Any]:
        """The architecture as JSON types, for the model directory."""

    def companions(self) -> dict[str, str]:
        """Model directories that the exported one must hold, by subdirectory name."""

    def adapters(self) -> dict[str, Adapter]:
        """How parameters of another architecture of this kind are made to fit, by name.

        Of a model that training starts from (`train.init_from`), only these may differ in shape.
        """


class ModelTask:
    """A task that trains one model, `self.model`, and nothing else."""

    model: FunctionalModel

    def init(self, rng: PRNGKeyArray) -> Params:
        return self.model.init(rng)

    def figures(
        self, params: Params, batch: Mapping[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> dict[str, float]:
        return {}

    def released(self, params: Params) -> Params:
        return params

    def model_config(self) -> dict[str, Any]:
        return dataclasses.asdict(self.model.config)

    def companions(self) -> dict[str, str]:
        return {}

    def adapters(self) -> dict[str, Adapter]:
        return {}


def load_frozen(
    cls: type, config_class: type, kind: str, directory: str, *, compute: Compute, shape: Any = None
) -> tuple[FunctionalModel, Params]:
    """Load a model that is used and not trained.

    Args:
        cls: of the module.
        config_class: of its architecture.
        kind: of the model directory.
        directory: as `model_dir.locate` takes it.
        compute: execution choices.
        shape: for compiling without weights: the architecture; nothing is read, and the parameters
            are shapes.

    Raises:
        ValueError: there is no such model.
    """
    if shape is not None:
        model = FunctionalModel(cls, shape, compute)
        return model, model.abstract_params()
    located = model_dir.locate(directory)
    model_dir.load_config(located, kind)
    loaded, params = model_dir.load_model(located)
    return FunctionalModel(cls, build(config_class, loaded["model"], directory), compute), params
