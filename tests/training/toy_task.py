"""A task of a few thousand parameters with everything that the training loop looks at."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics
from flax import nnx

from dar_jax.common import image as image_lib
from dar_jax.common.typing import Array, Float, Params, PRNGKeyArray
from dar_jax.kinds import KINDS
from dar_jax.kinds.base import Kind
from dar_jax.nn.layout import keep_batch_split
from dar_jax.pipelines.base import Autoencoder
from dar_jax.tasks.base import AbstractBatch, Panel, average, picture_batch

LAYERS = 2


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """Its architecture."""

    image_size: int = 8
    width: int = 128


class ToyKind(Kind[ToyConfig]):
    """What the training loop needs to know: it can be trained and exported, and nothing else."""

    name = "toy"
    noun = "a toy"
    module = nnx.Module
    architecture = ToyConfig
    pipeline = Autoencoder

    def task(self, model, loss, *, compute, data, companions):
        return ToyTask(model.image_size, model.width)

    def make_pipeline(self, model, params, **others):
        raise NotImplementedError

    def from_reference(self, checkpoint, model):
        raise NotImplementedError

    def to_reference(self, params, model):
        raise NotImplementedError


KINDS.setdefault(ToyKind.name, ToyKind())


@dataclasses.dataclass(frozen=True)
class ToyTask:
    """Denoise pictures with a residual MLP whose blocks are stacked and scanned."""

    image_size: int = 8
    width: int = 128
    nan_from_label: int | None = None
    """Make the loss NaN for every batch that holds this label."""

    def init(self, rng: PRNGKeyArray) -> Params:
        size = self.image_size**2 * 3
        rngs = jax.random.split(rng, 3)
        normal = lambda rng, *shape: 0.1 * jax.random.normal(rng, shape)  # noqa: E731
        return {
            "input": {"kernel": normal(rngs[0], size, self.width), "bias": jnp.zeros(self.width)},
            "blocks": {
                "kernel": normal(rngs[1], LAYERS, self.width, self.width),
                "bias": jnp.zeros((LAYERS, self.width)),
            },
            "output": {"kernel": normal(rngs[2], self.width, size)},
        }

    def frozen(self) -> Params:
        return {"scale": np.ones((), np.float32)}

    def abstract_frozen(self) -> Params:
        return {"scale": jax.ShapeDtypeStruct((), np.float32)}

    def abstract_batch(self, batch_size: int) -> AbstractBatch:
        return picture_batch(batch_size, self.image_size)

    def loss(
        self, params: Params, batch: dict[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        data = image_lib.to_float(batch["pixels"])
        noisy = data + 0.1 * jax.random.normal(rng, data.shape)
        error = jnp.mean((self.reconstruct(params, noisy) - data) ** 2) * frozen["scale"]
        if self.nan_from_label is not None:
            bad = jnp.any(batch["label"] == self.nan_from_label)
            error = jnp.where(bad, jnp.nan, error)
        return error, {"mse": error}

    def reconstruct(
        self, params: Params, image: Float[Array, "B H W 3"]
    ) -> Float[Array, "B H W 3"]:
        pixels = keep_batch_split(image.reshape(len(image), -1))
        x = keep_batch_split(pixels @ params["input"]["kernel"] + params["input"]["bias"])
        body = lambda x, layer: (x + jax.nn.gelu(x @ layer["kernel"] + layer["bias"]), None)  # noqa: E731
        x, _ = jax.lax.scan(body, x, params["blocks"])
        return (x @ params["output"]["kernel"]).reshape(image.shape)

    def metrics(self) -> dict[str, type[metrics.Metric]]:
        return {"mse": average("mse")}

    def pictures(
        self, params: Params, batch: dict[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> dict[str, Panel]:
        data = image_lib.to_float(batch["pixels"])
        pixels = np.asarray(image_lib.to_pixels(self.reconstruct(params, data)))
        labels = np.asarray(batch["label"]).tolist()
        return {"reconstruction": Panel(pixels[:, None], labels, ["decoded"])}

    def held_out_metrics(
        self, params: Params, batch: dict[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> dict[str, float]:
        return {}

    @property
    def complete_after(self) -> int:
        return 0

    @property
    def why_negative(self) -> str:
        return ""

    def released(self, params: Params) -> Params:
        return params

    def model_config(self) -> dict[str, int]:
        return {"image_size": self.image_size, "width": self.width}

    def files(self):
        return {}

    def adapters(self) -> dict[str, object]:
        return {}
