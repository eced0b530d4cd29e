"""Draws one request after the other as a pipeline does it: for whatever lanes cannot draw."""

import abc
from collections.abc import Iterator, Mapping
from typing import Any

from dar_jax.serving.drawing import Drawn, ImageInWork


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
