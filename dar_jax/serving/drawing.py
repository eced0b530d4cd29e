"""Draws the images of many requests side by side, a group of tokens at a time, on one device."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np

from dar_jax.common.compiled import call, compile_once
from dar_jax.common.image import to_pixels
from dar_jax.common.tree import tree_bytes
from dar_jax.common.typing import Bool, Float, UInt8
from dar_jax.models.dar import lanes
from dar_jax.models.dar.options import DarSampling
from dar_jax.models.dar.sampler import Known
from dar_jax.pipelines.dar import DarPipeline

T = TypeVar("T")
PARTS = 2
"""Lanes are drawn in parts of one size, half of all: few images pay for that many only. Programs of
another batch size round otherwise, so there is one of each kind."""
MIN_LANES = 8
"""For each core of a CPU; with fewer the fixed costs of a program show."""


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """Images that somebody asks for.

    Attributes:
        labels: class of every image, or a text if the model takes captions.
        seed: image i depends on it, i and its label and options only; 0 .. 2^32 - 1.
        sampling: of which guidance and temperature count; the rest is the server's.
        preview_groups: numbers of groups after which previews are handed out.
        known: image in [-1, 1] whose pixels are kept where `mask` is True; None is none.
        mask: see `known`.
    """

    labels: tuple[int | str, ...]
    seed: int
    sampling: Any
    preview_groups: frozenset[int] = frozenset()
    known: Float[np.ndarray, "H W 3"] | None = None
    mask: Bool[np.ndarray, "H W"] | None = None

    @property
    def count(self) -> int:
        """Images, each of which takes a lane."""
        return len(self.labels)


@dataclasses.dataclass(eq=False)
class ImageInWork:
    """Image `index` of a request, after `group` groups; `ticket` is the engine's own.

    What is asked for is of the batch's own kind; it has a `count` and `preview_groups`.
    """

    request: Any
    index: int
    ticket: Any = None
    group: int = 0


class Piece(NamedTuple):
    """What is handed out of a request.

    Attributes:
        image: number of the image in the request.
        group: groups of tokens that it is drawn from; all of them for the image itself.
        pixels: the preview, or the image.
        is_last: whether this is the image itself.
    """

    image: int
    group: int
    pixels: UInt8[np.ndarray, "H W 3"]
    is_last: bool


class Drawn(NamedTuple):
    """Row `row` of previews and tokens on the device belongs to `image` after `group` groups."""

    image: ImageInWork
    group: int
    previews: Any
    tokens: Any
    row: int


@runtime_checkable
class Batch(Protocol):
    """What an engine draws with, in lanes 0 .. size - 1; see `LaneBatch`."""

    @property
    def size(self) -> int: ...
    @property
    def num_groups(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    def warm_up(self) -> None: ...
    def reset(self) -> None: ...
    def draw(self, active: Mapping[int, ImageInWork]) -> list[Drawn]: ...
    def fetch(self, drawn: Drawn) -> Any: ...


class LaneBatch:
    """The lanes of one device.

    Attributes:
        drawing: the models and how they are used.
        size: most images at a time; lanes are numbered 0 .. size - 1.
    """

    def __init__(self, pipeline: DarPipeline, sampling: DarSampling, size: int):
        """Check the model; nothing is compiled before `warm_up`.

        Args:
            pipeline: the models.
            sampling: how images are drawn.
            size: most images at a time.

        Raises:
            ValueError: a model, mesh or option that lanes cannot be used with.
        """
        if pipeline.mesh is not None and pipeline.mesh.size > 1:
            raise ValueError(
                f"serving uses one device, the mesh has {pipeline.mesh.size}: start one process "
                "for each device"
            )
        tokenizer = pipeline.tokenizer
        self.drawing = lanes.Drawing(pipeline.prior.model.unstacked(), tokenizer.model, sampling)
        self.size = size
        self._params = pipeline.prior.sampling_params, tokenizer.sampling_params
        self._part = -(-size // PARTS)
        # Accelerators wait for the weights, which all lanes then share; CPUs for the products.
        self._decoded = self._part if jax.default_backend() == "cpu" else size
        self._lanes: lanes.Lanes | None = None

    @property
    def num_groups(self) -> int:
        return self.drawing.num_groups

    @property
    def num_bytes(self) -> int:
        """Memory of the lanes, without the models."""
        return tree_bytes(self._lanes)

    def warm_up(self) -> None:
        """Compile every program that any request may need, and run it once."""
        compile_once(self._programs, (self.drawing, self.size))
        for images in self._programs(call):
            np.asarray(images)
        self.reset()

    def reset(self) -> None:
        """Begin with empty lanes."""
        self._lanes = lanes.empty(self.drawing, self.size + 1)

    def draw(self, active: Mapping[int, ImageInWork]) -> list[Drawn]:
        """Dispatch one group of the images in these lanes, and what it completes; return previews.

        Nothing waits for the device. An image of no groups begins in its lane.
        """
        assert self._lanes is not None, "warm_up comes first"
        state, images = self._lanes, list(active.items())
        for new in _parts([item for item in images if item[1].group == 0], self._part):
            at = _padded([lane for lane, _ in new], self._part, self.size)
            begun = [image for _, image in new]
            begun += begun[-1:] * (self._part - len(begun))  # to the spare lane
            state = lanes.begin(state, at, self._asked(begun))
        for part in _parts(images, self._decoded):
            at = _padded([lane for lane, _ in part], self._decoded, self.size)
            first = [image.group * self.drawing.group_size for _, image in part]
            first = _padded(first, self._decoded, 0)
            state = lanes.decode_group(self.drawing, self._params, state, at, first)
        ends = (0, *self.drawing.steps_after)
        pending = [
            (lane, image, range(ends[image.group], ends[image.group + 1])) for lane, image in images
        ]
        for _, image in images:
            image.group += 1
        drawn = []
        # Who has the most steps to take goes first, so that the last parts are full as well.
        while pending := sorted((p for p in pending if p[2]), key=lambda p: -len(p[2])):
            part = pending[: self._part]
            at = _padded([lane for lane, _, _ in part], self._part, self.size)
            step = _padded([steps[0] for _, _, steps in part], self._part, 0)
            flow = (self.drawing, self._params[1], state, at, step)
            state, previews, tokens = lanes.flow_step(*flow)
            drawn += [
                Drawn(image, image.group, previews, tokens, row)
                for row, (_, image, steps) in enumerate(part)
                if len(steps) == 1
            ]
            taken = [(lane, image, steps[1:]) for lane, image, steps in part]
            pending = taken + pending[self._part :]
        self._lanes = state
        return drawn

    def fetch(self, drawn: Drawn) -> Piece:
        """Wait for a preview.

        Raises:
            ValueError: what the model draws is not finite.
        """
        image = np.asarray(drawn.previews)[drawn.row]
        tokens = np.asarray(drawn.tokens)[drawn.row, : drawn.group * self.drawing.group_size]
        if not np.isfinite(image).all() or (tokens < 0).any():
            raise ValueError("what the model draws is not finite: check its weights")
        is_last = drawn.group == self.num_groups
        return Piece(drawn.image.index, drawn.group, to_pixels(image), is_last)

    def _programs(self, run: Callable[..., Any]) -> Iterator[Any]:
        state: Any = lanes.empty(self.drawing, self.size + 1)
        image = ImageInWork(Request((0,), 0, self.drawing.sampling), 0)
        at, zeros = np.full(self.size, self.size, np.int32), np.zeros(self.size, np.int32)
        part, decoded = slice(self._part), slice(self._decoded)
        state = run(lanes.begin, state, at[part], self._asked([image] * self._part))
        decode = (self.drawing, self._params, state, at[decoded], zeros[decoded])
        state = run(lanes.decode_group, *decode)
        flow = (self.drawing, self._params[1], state, at[part], zeros[part])
        state, images, _ = run(lanes.flow_step, *flow)
        yield images

    def _asked(self, images: Sequence[ImageInWork]) -> lanes.Asked:
        config = self.drawing.tokenizer.config
        side, requests = config.image_size, [image.request for image in images]
        nothing = np.zeros((side, side, 3), np.float32), np.zeros((side, side), bool)
        known = [nothing if r.known is None else (r.known, r.mask) for r in requests]
        return lanes.Asked(
            label=np.asarray([image.request.labels[image.index] for image in images], np.int32),
            seed=np.asarray([r.seed for r in requests], np.uint32),
            index=np.asarray([image.index for image in images], np.int32),
            scales=np.stack([r.sampling.scales(config.num_tokens) for r in requests]),
            temperature=np.asarray([r.sampling.temperature for r in requests], np.float32),
            known=Known(*map(np.stack, zip(*known, strict=True))),
        )


class CoresBatch:
    """Lanes of a CPU, dealt out to batches of one size, each with a thread of its own.

    JAX runs what one thread asks a CPU for in turn, and a small program does not fill its cores.
    """

    def __init__(self, batches: Sequence[LaneBatch]):
        self._batches = batches
        threads = concurrent.futures.ThreadPoolExecutor
        self._threads = [threads(1, "lanes") for _ in batches]
        self.drawing = batches[0].drawing
        self.size = sum(batch.size for batch in batches)

    @property
    def num_groups(self) -> int:
        return self.drawing.num_groups

    @property
    def num_bytes(self) -> int:
        """Memory of all lanes, without the models."""
        return sum(batch.num_bytes for batch in self._batches)

    def warm_up(self) -> None:
        """See `LaneBatch`; all of them run the same programs."""
        for batch in self._batches:
            batch.warm_up()

    def reset(self) -> None:
        """Begin with empty lanes."""
        for batch in self._batches:
            batch.reset()

    def draw(self, active: Mapping[int, ImageInWork]) -> list[Drawn]:
        """See `LaneBatch`; images in neighbouring lanes are drawn side by side."""
        count, work = len(self._batches), []
        for number, (batch, thread) in enumerate(zip(self._batches, self._threads, strict=True)):
            own = {lane // count: image for lane, image in active.items() if lane % count == number}
            work += [thread.submit(batch.draw, own)] if own else []
        concurrent.futures.wait(work)  # what fails in one is reset when no other is at work
        return [drawn for future in work for drawn in future.result()]

    def fetch(self, drawn: Drawn) -> Piece:
        """Wait for a preview, see `LaneBatch`."""
        return self._batches[0].fetch(drawn)


def lane_batch(pipeline: DarPipeline, sampling: DarSampling, size: int) -> LaneBatch | CoresBatch:
    """Return lanes for at least `size` images, as suits the device; see `LaneBatch`."""
    cores = (os.cpu_count() or 1) if jax.default_backend() == "cpu" else 1
    count = max(1, min(cores, size // MIN_LANES))
    batches = [LaneBatch(pipeline, sampling, -(-size // count)) for _ in range(count)]
    return CoresBatch(batches) if count > 1 else batches[0]


def _parts(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Cut into parts of so many items; the last one may have fewer."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def _padded(values: Sequence[int], size: int, fill: int) -> np.ndarray:
    padded = np.full(size, fill, np.int32)
    padded[: len(values)] = values
    return padded
