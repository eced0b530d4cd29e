"""What pipelines of all kinds share: models on a mesh, their surface, keys of images, batches."""

import abc
import collections
import dataclasses
import difflib
import functools
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dar_jax.common.batches import pad, padded_size, side_by_side
from dar_jax.common.tree import num_parameters
from dar_jax.common.typing import Any, Array, Bool, Float, Int, Params, PRNGKeyArray
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel, M
from dar_jax.parallel.sharding import (
    batch_sharding,
    check_batch_size,
    fsdp_sharding,
    num_batch_shards,
)

T = TypeVar("T")
Labels = Array | np.ndarray | Sequence[int | str] | int | np.integer | str
"""Classes by index or name: one or several; where a model takes captions, those."""
BATCH_SIZE = 100
"""Images that are drawn at a time by a model whose directory recommends no number."""
PER_IMAGE = ("prefix", "caption_mask", "known", "mask")
"""Arguments of `Pipeline.stream` that have a row for every image."""


class ModelPipeline(Generic[M]):
    """One model and its parameters.

    With a mesh the parameters are spread by the FSDP rule and batches over its data axes.
    """

    def __init__(
        self,
        model: FunctionalModel[M],
        params: Params,
        *,
        class_names: Sequence[str] = (),
        mesh: Mesh | None = None,
    ):
        self.model = model
        self.config: Any = model.config
        self.mesh = mesh
        self.params = jax.device_put(params, mesh and fsdp_sharding(params, mesh))
        self.class_names = tuple(class_names)

    @functools.cached_property
    def sampling_params(self) -> Params:
        """Parameters with the matrices in the compute dtype, cast once: what sampling reads."""
        return cast_kernels(self.params, self.model.compute.jnp_dtype)

    def put(self, batch: Any) -> Any:
        """Put a tree of arrays [B, ...] on the devices, see `put_batch`."""
        return put_batch(batch, self.mesh)


class Reconstruction(NamedTuple):
    """`images` float32 [B, H, W, 3], not clipped; `indices` int32 [B, N] of a codebook, or None."""

    images: Array
    indices: Array | None


class Autoencoder(ModelPipeline[M], abc.ABC):
    """Images to codes or latents and back; it draws none by itself.

    Attributes:
        sampling_class: dataclass of how images are drawn; None if nothing is.
        sampling: the options that the model is best used with; those of its directory, which
            otherwise hold what the class does.
        batch_size: images that are best decoded at a time.
        directory: that it was read from; None if it was made of weights.
    """

    sampling_class: type | None = None
    batch_size: int = BATCH_SIZE
    directory: pathlib.Path | None = None

    @functools.cached_property
    def sampling(self) -> Any:
        return None if self.sampling_class is None else self.sampling_class()

    @property
    def codebook_size(self) -> int | None:
        """Number of codes; None where latents are continuous."""
        return None

    @abc.abstractmethod
    def encode(self, images: Array | np.ndarray) -> Array:
        """Encode images [B, H, W, 3] in [-1, 1] to codes [B, N] or moments of latents."""

    @abc.abstractmethod
    def reconstruct(
        self,
        images: Array | np.ndarray,
        *,
        rng: PRNGKeyArray | int,
        first_index: int = 0,
        sampling: Any = None,
    ) -> Reconstruction:
        """Encode and decode images [B, H, W, 3] in [-1, 1].

        Args:
            images: the originals.
            rng: key or seed; what is drawn for image i depends on `fold_in(rng, first_index + i)`.
            first_index: of the first image.
            sampling: options of its kind; None is as the model is best used.
        """

    def previews(
        self, images: Array | np.ndarray, *, rng: PRNGKeyArray | int, sampling: Any = None
    ) -> Float[Array, "steps B H W 3"]:
        """Return what `reconstruct` makes, after what it went through if there is something."""
        return self.reconstruct(images, rng=rng, sampling=sampling).images[None]

    def between(self, ends: Array | np.ndarray, num_images: int) -> Int[Array, "num_images N"]:
        """Return indices on the way between those of two images, where there is a codebook."""
        raise ValueError(f"codebook_size={self.codebook_size}: it takes codes to be between two")

    def check_image_size(self, image_size: int) -> None:
        """Raise ValueError unless square images of this size can be reconstructed."""


@runtime_checkable
class Preview(Protocol):
    """An image that is not finished: `step` steps are taken; `images` [B, H, W, 3] in [-1, 1]."""

    @property
    def step(self) -> int: ...
    @property
    def images(self) -> Array: ...


class Pipeline(abc.ABC):
    """Class labels to images, whatever the model.

    How images are drawn is said by `sampling`, the options of the kind as one dataclass, or by its
    fields as keyword arguments, which count before it.

    Attributes:
        sampling_class: that dataclass.
        sampling: the options that the model is best used with, of that class: what its directory
            recommends. An instance may be put in its place.
        batch_size: images that are best drawn at a time: `generate` draws more of them in turns.
        generated_class: dataclass of what `generate` returns: `images`, and fields of the last
            preview that are kept beside them.
        keeps_tokens: whether `stream` takes `prefix`, `known` and `mask`: layout control and
            in-painting.
        has_likelihood: whether `log_likelihood` and `class_log_likelihoods` score images.
        prior: the model that draws tokens or latents.
        class_names: of the classes that have a name.
    """

    sampling_class: type
    generated_class: type
    batch_size: int = BATCH_SIZE
    keeps_tokens: bool = False
    has_likelihood: bool = False

    def __init__(self, prior: ModelPipeline, class_names: Sequence[str]):
        self.prior = prior
        self.class_names = tuple(class_names)
        self.sampling = self.sampling_class()

    def __repr__(self) -> str:
        models = [self.prior, self.autoencoder]
        parts = ", ".join(f"{type(model).__name__} of {_count(model.params)}" for model in models)
        devices = 1 if self.mesh is None else self.mesh.size
        return (
            f"{type(self).__name__}({parts}; {self.num_classes} classes, {self.image_size} pixels, "
            f"{self.compute.dtype}, {devices} device{'s'[: devices != 1]}; {self.sampling})"
        )

    def class_indices(self, labels: Any) -> Any:
        """Return class labels [B], given as one class or several, by name or index.

        Anything else, such as captions, is returned as it is.

        Raises:
            ValueError: no class has that name.
        """
        if isinstance(labels, str | int | np.integer):
            labels = [labels if isinstance(labels, str | bool) else int(labels)]
        if isinstance(labels, np.ndarray) and labels.dtype.kind == "U":
            labels = labels.tolist()
        if isinstance(labels, Sequence) and any(isinstance(label, str) for label in labels):
            names = self.class_names
            return [
                class_index(label, names) if isinstance(label, str) else label for label in labels
            ]
        return labels

    def options(self, sampling: Any, given: Mapping[str, Any]) -> Any:
        """Return how images are drawn: as the model is best used, or as a caller says.

        Raises:
            ValueError: `sampling` is of another class than the kind's.
        """
        if not isinstance(sampling, self.sampling_class | None):
            expected = self.sampling_class.__name__
            raise ValueError(f"sampling={sampling!r} must be an instance of {expected}")
        return dataclasses.replace(sampling or self.sampling, **given)

    def settings(self, sampling: Any) -> dict[str, Any]:
        """What images depend on of the options of the kind, and of the files that they name."""
        return dataclasses.asdict(sampling)

    @property
    def kept_fields(self) -> tuple[str, ...]:
        """Fields of the last preview that are kept beside the images."""
        names = (field.name for field in dataclasses.fields(self.generated_class))
        return tuple(name for name in names if name != "images")

    @property
    def num_tokens(self) -> int:
        """Of an image; 0 if the model has none."""
        return 0

    @property
    def num_classes(self) -> int:
        """Labels are 0 .. num_classes - 1."""
        return self.prior.config.num_classes

    @property
    def mesh(self) -> Mesh | None:
        """The devices that a batch is split over."""
        return self.prior.mesh

    @property
    def compute(self) -> Compute:
        """Execution choices."""
        return self.prior.model.compute

    @property
    @abc.abstractmethod
    def autoencoder(self) -> Autoencoder:
        """The tokenizer or autoencoder that makes images of what the prior draws."""

    @property
    @abc.abstractmethod
    def image_size(self) -> int:
        """Side in pixels of the images that it works on."""

    @property
    def output_size(self) -> int:
        """Side in pixels of those that it returns."""
        return self.image_size

    @abc.abstractmethod
    def stream(
        self,
        labels: Labels,
        *,
        rng: PRNGKeyArray | int,
        first_index: int = 0,
        previews: bool = True,
        **options: Any,
    ) -> Iterator[Preview]:
        """Return previews of one image per label; the last one is the image.

        With `previews=False` there is nothing but the image. Image i depends on
        `fold_in(rng, first_index + i)` and its label only.
        """

    def generate(self, labels: Labels, *, first_index: int = 0, **options: Any) -> Any:
        """Return the end of `stream` as `generated_class`.

        A small batch is padded to one of few sizes, so that all sizes share few programs; more than
        `batch_size` images are drawn in turns. With `microbatch` the batch is as the caller says.

        Raises:
            ValueError: see `stream`, or what the model draws is not finite.
        """
        given = {name: options[name] for name in PER_IMAGE if options.get(name) is not None}
        if np.ndim(given.get("mask", ())) == 2:
            del given["mask"]  # one for all images
        rows = {"labels": self.class_indices(labels), **given}
        sizes = {len(value) if np.ndim(value) else 0 for value in rows.values()}
        if len(sizes) > 1 or options.get("microbatch") is not None:
            return self.generated_class(**_checked(*self._draw(rows, first_index, options)))
        size, shards = sizes.pop(), num_batch_shards(self.mesh)
        turn = max(self.batch_size // shards, 1) * shards
        padded = padded_size(size, shards) if size <= turn else turn
        if padded == size or size % shards:
            return self.generated_class(**_checked(*self._draw(rows, first_index, options)))

        def draw(first: int) -> tuple[dict[str, Array], int]:
            part = {name: np.asarray(row)[first : first + padded] for name, row in rows.items()}
            part = {name: pad(row, padded) for name, row in part.items()}
            return self._draw(part, first_index + first, options)

        def fetch(drawn: tuple[dict[str, Array], int]) -> dict[str, np.ndarray]:
            # To the host, where no size needs a program.
            return {name: np.asarray(array) for name, array in _checked(*drawn).items()}

        parts = [*side_by_side(draw, fetch, range(0, size, padded), self.mesh)]
        kept = {name: np.concatenate([part[name] for part in parts])[:size] for name in parts[0]}
        return self.generated_class(**self.prior.put(kept))

    def _draw(
        self, rows: dict[str, Any], first_index: int, options: dict[str, Any]
    ) -> tuple[dict[str, Array], int]:
        """Dispatch one batch; return it by name, with the index of its first image."""
        last = last_of(self.stream(**{**options, **rows}, first_index=first_index, previews=False))
        return {name: getattr(last, name) for name in ("images", *self.kept_fields)}, first_index


def _checked(drawn: dict[str, Array], first_index: int) -> dict[str, Array]:
    """Return what was drawn once all of it is known to be finite; see `check_sound`."""
    check_sound(is_sound(*drawn.values()), first_index)
    return drawn


@jax.jit
def is_sound(*arrays: Array) -> Bool[Array, " B"]:
    """Tell for every row whether its numbers are finite and its integers, tokens, not negative."""

    def rows(array: Array) -> Array:
        whole = array >= 0 if jnp.issubdtype(array.dtype, jnp.integer) else jnp.isfinite(array)
        return jnp.all(whole.reshape(len(array), -1), axis=1)

    return jnp.all(jnp.stack([rows(array) for array in arrays]), axis=0)


def check_sound(sound: Bool[Array | np.ndarray, " B"], first_index: int = 0) -> None:
    """Raise ValueError, with the first image, unless all are sound."""
    wrong = np.flatnonzero(~np.asarray(sound))
    if wrong.size:
        raise ValueError(
            f"image {first_index + wrong[0]}: what the model draws is not finite, as of "
            f"{wrong.size} of {len(sound)} images; check its weights, and the sampling options"
        )


def class_index(name: str, class_names: Sequence[str]) -> int:
    """Index of the class of this name.

    Raises:
        ValueError: there is none; the nearest names are offered.
    """
    if name in class_names:
        return class_names.index(name)
    near = difflib.get_close_matches(name, class_names, n=3, cutoff=0.4) or class_names[:3]
    raise ValueError(
        f"no class is called {name!r}; "
        + (f"there is {', '.join(near)}" if near else "this model knows its classes by index only")
    )


def last_of(items: Iterable[T]) -> T:
    """Return the last item, without holding those before it."""
    return collections.deque(items, maxlen=1).pop()


def _count(params: Params) -> str:
    """Number of parameters, in millions where there are as many."""
    number = num_parameters(params)
    return f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number / 1e3:.0f}k"


def put_batch(batch: Any, mesh: Mesh | None) -> Any:
    """Put a tree of arrays [B, ...] on the device, or split them over the mesh.

    Raises:
        ValueError: a batch does not divide over the mesh.
    """
    if mesh is None:
        return jax.device_put(batch)  # compiles nothing, whatever the shape
    for leaf in jax.tree.leaves(batch):
        check_batch_size(len(leaf), mesh)
    return jax.device_put(batch, batch_sharding(mesh))


def cast_kernels(params: Params, dtype: jnp.dtype) -> Params:
    """Cast what linear layers cast at every call; norms and the codebook stay float32."""
    return {
        name: cast_kernels(value, dtype)
        if isinstance(value, dict)
        else value.astype(dtype if name == "kernel" else value.dtype)
        for name, value in params.items()
    }
