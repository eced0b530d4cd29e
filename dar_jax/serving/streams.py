"""Draws one request after the other as a pipeline does it: for whatever lanes cannot draw."""

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dar_jax.common.checks import check_finite
from dar_jax.common.image import to_pixels
from dar_jax.pipelines.base import Pipeline
from dar_jax.sampling.logits import MIN_LINEAR_START
from dar_jax.serving.drawing import Drawn, ImageInWork, Piece, Request


class StreamBatch(abc.ABC):
    """One lane, whose groups are the steps that are taken."""

    size = 1
    num_bytes = 0

    def __init__(self) -> None:
        self.reset()

    @abc.abstractmethod
    def begin(self, image: ImageInWork) -> Iterator[Any]:
        """Return the previews of what is asked for, on the device, see `Pipeline.stream`."""

    def reset(self) -> None:
        """Forget what is being drawn."""
        self._previews: Iterator[Any] = iter(())

    def draw(self, active: Mapping[int, ImageInWork]) -> list[Drawn]:
        """Dispatch what the next preview needs; return that."""
        (image,) = active.values()
        if image.group == 0:
            self._previews = self.begin(image)
        preview = next(self._previews)
        image.group = preview.step
        return [Drawn(image, preview.step, preview, None, 0)]


class ImageBatch(StreamBatch):
    """Draws one image after the other with any pipeline.

    Attributes:
        steps: after which there is a preview; the last one is the image.
    """

    def __init__(self, pipeline: Pipeline, sampling: Any, label: int | str):
        """Draw an image of this label, which compiles everything."""
        super().__init__()
        self._pipeline = pipeline
        request = Request((label,), 0, sampling)
        self.steps = tuple(preview.step for preview in self.begin(ImageInWork(request, 0)))
        if pipeline.keeps_tokens:
            size = pipeline.image_size
            known, mask = np.zeros((size, size, 3), np.float32), np.zeros((size, size), bool)
            list(self.begin(ImageInWork(dataclasses.replace(request, known=known, mask=mask), 0)))

    @property
    def num_groups(self) -> int:
        return self.steps[-1]

    def warm_up(self) -> None:
        """Compile nothing: that is done."""

    def begin(self, image: ImageInWork) -> Iterator[Any]:
        request: Request = image.request
        # Without guidance it is another program; so little of it is not seen.
        scales = tuple(max(s, MIN_LINEAR_START) for s in request.sampling.guidance_scale)
        kept = {}
        if request.known is not None:
            kept = {"known": request.known[None], "mask": request.mask}
        return self._pipeline.stream(
            [request.labels[image.index]],
            rng=request.seed,
            first_index=image.index,
            sampling=dataclasses.replace(request.sampling, guidance_scale=scales),
            **kept,
        )

    def fetch(self, drawn: Drawn) -> Piece:
        """Wait for a preview.

        Raises:
            ValueError: what the model draws is not finite.
        """
        (pixels,) = np.asarray(drawn.previews.images)
        check_finite("what the model draws", pixels)
        is_last = drawn.group == self.num_groups
        return Piece(drawn.image.index, drawn.group, to_pixels(pixels), is_last)
