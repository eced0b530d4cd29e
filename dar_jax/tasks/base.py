"""What the trainer asks of a task, and what most tasks answer.

Tasks draw all randomness and pass it in to the models.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

from dar_jax.common.image import RGB, labelled_grid
from dar_jax.common.typing import Any, Array, Params, PRNGKeyArray, UInt8
from dar_jax.nn.functional_model import FunctionalModel

DISCRIMINATOR = "discriminator"
"""Subtree of the trained parameters that has an optimizer of its own: the judge of an adversarial
loss, which `released` leaves out."""

AbstractBatch = dict[str, jax.ShapeDtypeStruct]
Adapter = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
"""Makes a parameter of another shape fit, as far as it can."""


@functools.cache
def average(output: str) -> type[metrics.Metric]:
    """Mean of an output of `loss`: one class for all runs, since JAX keeps all that it has seen."""
    return metrics.Average.from_output(output)


class FrozenModel(NamedTuple):
    """A model that a task uses and does not train.

    Attributes:
        model: the model.
        params: its parameters, or their shapes where nothing is computed.
    """

    model: FunctionalModel
    params: Params


class Panel(NamedTuple):
    """Pictures in rows and columns.

    Attributes:
        cells: uint8 [rows, columns, H, W, 3].
        labels: class of every row, or its name.
        header: what every column shows.
    """

    cells: UInt8[np.ndarray, "rows columns H W 3"]
    labels: Sequence[int | str]
    header: Sequence[str]

    def draw(self, class_names: Sequence[str]) -> UInt8[np.ndarray, "height width 3"]:
        """Draw them, enlarged to a legible size, with what rows and columns show."""
        known: dict[int | str, str] = dict(enumerate(class_names))
        names = [known.get(label, str(label)) for label in self.labels]
        flat = self.cells.reshape(-1, *self.cells.shape[2:])
        return labelled_grid(flat, names, len(self.header), self.header)


@runtime_checkable
class Task(Protocol):
    """What a batch, a loss and a picture are; pure functions of the parameters.

    A batch is `{"pixels": uint8 [B, H, W, 3], "label": int32 [B]}`; with groups of references the
    pixels are [B, K, H, W, 3]. A cache has "codes" (see `data.codes`) or "moments" (see
    `data.latents`) instead of pixels, and may have "captions" [B, T, F] and "caption_mask" [B, T].
    `loss` also gets "step", the number of completed updates.
    """

    def init(self, rng: PRNGKeyArray) -> Params:
        """Draw the trained parameters."""
        ...

    def frozen(self) -> Params:
        """Load the parameters of nets that are used but not trained; an argument of every step.

        Raises:
            ValueError: they cannot be had; the message says how to get them.
        """
        ...

    def abstract_frozen(self) -> Params:
        """Shapes and dtypes of `frozen`; nothing is loaded."""
        ...

    def loss(
        self, params: Params, batch: Mapping[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> tuple[Array, dict[str, Array]]:
        """Return the scalar loss (mean over the batch) and what the metrics are made from."""
        ...

    def abstract_batch(self, batch_size: int) -> AbstractBatch:
        """Shapes and dtypes of a batch; see `Task`."""
        ...

    def metrics(self) -> dict[str, type[metrics.Metric]]:
        """Metric classes by name, fed with the outputs of `loss`."""
        ...

    def pictures(
        self, params: Params, batch: Mapping[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> dict[str, Panel]:
        """Draw pictures from averaged parameters and a held-out batch."""
        ...

    def held_out_metrics(
        self, params: Params, batch: Mapping[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> dict[str, float]:
        """Measure the same on the same batch; names as they are logged below `eval/`."""
        ...

    def released(self, params: Params) -> Params:
        """Return the part of the parameters that the model directory holds."""
        ...

    def model_config(self) -> dict[str, Any]:
        """The architecture as JSON types, for the model directory."""
        ...

    @property
    def why_negative(self) -> str:
        """Why the loss may be below zero; "" if it may not."""
        ...

    @property
    def complete_after(self) -> int:
        """Number of updates after which the loss has all its terms."""
        ...

    def files(self) -> dict[str, str]:
        """Paths of files and model directories that only the loss needs, by key.

        A run is bound to their contents.
        """
        ...

    def adapters(self) -> dict[str, Adapter]:
        """How parameters of another architecture of this kind are made to fit, by name.

        Of a model that training starts from (`train.init_from`), others of another shape are drawn
        anew.
        """
        ...


class ModelTask:
    """A task that trains one model, `self.model`, and nothing else."""

    model: FunctionalModel

    def init(self, rng: PRNGKeyArray) -> Params:
        return self.model.init(rng)

    def held_out_metrics(
        self, params: Params, batch: Mapping[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> dict[str, float]:
        return {}

    def released(self, params: Params) -> Params:
        return params

    @property
    def why_negative(self) -> str:
        return ""

    @property
    def complete_after(self) -> int:
        return 0

    def model_config(self) -> dict[str, Any]:
        return dataclasses.asdict(self.model.config)

    def files(self) -> dict[str, str]:
        return {}

    def adapters(self) -> dict[str, Adapter]:
        return {}


def picture_batch(batch_size: int, image_size: int, num_references: int = 1) -> AbstractBatch:
    """Shapes of a batch of square pictures, or of groups of them, with their labels."""
    group = () if num_references == 1 else (num_references,)
    shape = (batch_size, *group, image_size, image_size, RGB)
    return {"pixels": jax.ShapeDtypeStruct(shape, jnp.uint8), "label": label_shape(batch_size)}


def label_shape(batch_size: int) -> jax.ShapeDtypeStruct:
    """Shape of the labels of a batch."""
    return jax.ShapeDtypeStruct((batch_size,), jnp.int32)
