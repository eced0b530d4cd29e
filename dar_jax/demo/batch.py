"""What the demo generates: checked requests, each one batch of the same size.

A batch is padded, guidance is never off and kept tokens come in a few numbers, so that everything
is compiled at the start and nothing by a request.
"""

import dataclasses
import pathlib
import time
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from dar_jax.common import image as images
from dar_jax.common.batches import pad
from dar_jax.common.checks import check_finite, check_range
from dar_jax.common.typing import Int, UInt8
from dar_jax.data.decode import UnreadablePictureError, decode
from dar_jax.data.transforms import center_crop
from dar_jax.demo.config import MEGABYTE
from dar_jax.generation.batches import read_prompts, takes_texts, whole_batch
from dar_jax.generation.config import SampleConfig
from dar_jax.generation.image_set import label_array
from dar_jax.pipelines.base import Pipeline
from dar_jax.sampling.logits import MIN_LINEAR_START
from dar_jax.serving.drawing import Drawn, ImageInWork
from dar_jax.serving.streams import StreamBatch

MAX_GUIDANCE = 20.0
MAX_TEMPERATURE = 2.0
MAX_SEED = 2**31 - 1
PROMPT = "a red apple"
"""That the page begins with, where none is set."""
MAX_PROMPT = 1000
"""Characters of a prompt, of which models take some dozens of words."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Formats of uploaded pictures; some of the others that Pillow knows start programs."""
MAX_PIXELS = 50_000_000
"""Size of an uploaded picture: a small file may hold a picture that fills the memory."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What somebody asks for.

    Attributes:
        labels: a class for every image, or a text if the model takes captions.
        guidance_scale: at the first and at the last token; a single one if there are no tokens.
        temperature: divides the logits; 0 is greedy.
        seed: image i depends on it, on i and on its label.
        layout: a picture whose first tokens are kept, or None.
        num_kept: how many of them.
    """

    labels: tuple[int | str, ...]
    guidance_scale: tuple[float, ...]
    temperature: float
    seed: int
    layout: UInt8[np.ndarray, "H W 3"] | None = None
    num_kept: int = 0
    count: ClassVar[int] = 1
    """All images are drawn together."""
    preview_groups: ClassVar[range] = range(MAX_SEED)
    """All previews are shown."""


class PixelPreview(NamedTuple):
    """The images of a request after some of the tokens.

    Attributes:
        step: denoising steps taken.
        num_tokens: tokens known; 0 if the model has none.
        seconds: since the work began.
        pixels: of all images.
        is_last: whether they are finished.
    """

    step: int
    num_tokens: int
    seconds: float
    pixels: UInt8[np.ndarray, "B H W 3"]
    is_last: bool


class BatchGenerator(StreamBatch):
    """Answers requests with a pipeline.

    Attributes:
        pipeline: the models.
        batch_size: most images of a request.
        prompts: to begin with; none if requests are of classes, not of texts.
        sampling: how images are drawn where requests do not say it.
        kept_choices: numbers of tokens of a layout that can be kept; none if the model has no
            tokens.
        num_tokens: of an image; 0 if the model has none.
        num_scales: of the guidance of a request.
        num_steps: after which an image is finished.
        compile_seconds: that everything took to compile.
    """

    num_steps = 0

    def __init__(self, pipeline: Pipeline, settings: SampleConfig, batch_size: int):
        """Run everything that a request may need once."""
        super().__init__()
        self.pipeline = pipeline
        self.batch_size = whole_batch(pipeline, batch_size)
        texts = takes_texts(pipeline.prior.config)
        self.prompts = read_prompts(settings.prompts) if texts else ()
        self.sampling = settings.sampling(pipeline.sampling)
        self._seed = settings.seed
        self.num_tokens = pipeline.num_tokens
        self.num_scales = 2 if self.num_tokens else 1
        self.kept_choices = tuple(n for n in settings.prefix_tokens if 0 < n < self.num_tokens)
        started = time.monotonic()
        self.num_steps = self._compile()
        self.compile_seconds = time.monotonic() - started

    @property
    def num_groups(self) -> int:
        return self.num_steps

    def warm_up(self) -> None:
        """Compile nothing: that is done."""

    def default_request(self, labels: tuple[int, ...] | tuple[str, ...]) -> Request:
        """Return what the settings ask for."""
        scales = self.sampling.guidance_scale
        # One scale for all passes: that of the last one, which makes the image.
        scales = (scales[0], scales[-1])[-self.num_scales :]
        temperature = getattr(self.sampling, "temperature", 1.0)
        return Request(labels, tuple(scales), temperature, self._seed)

    def _compile(self) -> int:
        request = self.default_request(self.prompts[:1] or (0,))
        *_, last = self.stream(request)
        size = self.pipeline.image_size
        layout = np.zeros((size, size, 3), np.uint8)
        for num_kept in self.kept_choices:
            kept = dataclasses.replace(request, layout=layout, num_kept=num_kept)
            for preview in self.stream(kept):
                # From here on it is as without a layout.
                if preview.num_tokens > num_kept:
                    break
        return last.step

    def check(self, request: Request) -> None:
        """Raise ValueError unless the request can be answered."""
        verb, nouns = ("write", "prompts") if self.prompts else ("choose", "classes")
        if not request.labels:
            raise ValueError(f"there are no {nouns}: {verb} one at least")
        if len(request.labels) > self.batch_size:
            raise ValueError(
                f"{len(request.labels)} images are asked for, at most {self.batch_size} are made "
                f"at a time: {verb} fewer {nouns} or fewer images of each"
            )
        if self.prompts:
            longest = max(len(str(text)) for text in request.labels)
            if longest > MAX_PROMPT:
                raise ValueError(f"a prompt of {longest} characters: write {MAX_PROMPT} at most")
        else:
            check_range("class", request.labels, self.pipeline.num_classes)
        for name, values, least, most in (
            ("guidance", request.guidance_scale, 1, MAX_GUIDANCE),
            ("temperature", (request.temperature,), 0, MAX_TEMPERATURE),
            ("seed", (request.seed,), 0, MAX_SEED),
        ):
            if not all(least <= value <= most for value in values):
                shown = ", ".join(f"{value:g}" for value in values)
                raise ValueError(f"{name} {shown} must be between {least} and {most:g}")
        if request.layout is not None and request.num_kept not in self.kept_choices:
            choices = ", ".join(map(str, self.kept_choices))
            raise ValueError(f"{request.num_kept} tokens of the layout: choose one of {choices}")

    def begin(self, image: ImageInWork) -> Iterator[Any]:
        """Begin to draw; see `StreamBatch`.

        Raises:
            ValueError: the request cannot be answered.
        """
        request: Request = image.request
        self.check(request)
        self._started = time.monotonic()
        labels = pad(label_array(request.labels), self.batch_size)
        rng = jax.random.key(request.seed)
        return self.pipeline.stream(labels, rng=rng, **self._options(request))

    def fetch(self, drawn: Drawn) -> PixelPreview:
        """Wait for a preview.

        Raises:
            ValueError: what the model draws is not finite.
        """
        preview = drawn.previews
        # Further work on the device would queue behind the next step.
        image = np.asarray(preview.images)
        check_finite("images that the model draws", image)
        return PixelPreview(
            preview.step,
            getattr(preview, "num_tokens", 0),
            time.monotonic() - self._started,
            images.to_pixels(image)[: len(drawn.image.request.labels)],
            is_last=preview.step == self.num_steps,
        )

    def stream(self, request: Request) -> Iterator[PixelPreview]:
        """Yield the previews of a request, without an engine; the last one holds the images.

        Raises:
            ValueError: the request cannot be answered; with the first preview.
        """
        image = ImageInWork(request, 0)
        for preview in self.begin(image):
            yield self.fetch(Drawn(image, preview.step, preview, None, 0))

    def _options(self, request: Request) -> dict[str, Any]:
        # Without guidance it is another program; so little of it is not seen.
        scales = tuple(max(scale, MIN_LINEAR_START) for scale in request.guidance_scale)
        changes: dict[str, Any] = {"guidance_scale": scales}
        if hasattr(self.sampling, "temperature"):
            changes["temperature"] = float(request.temperature)
        options = {"sampling": dataclasses.replace(self.sampling, **changes)}
        if request.layout is not None:
            options["prefix"] = self._prefix(request.layout, request.num_kept)
        return options

    def _prefix(self, layout: UInt8[np.ndarray, "H W 3"], num_kept: int) -> Int[np.ndarray, "B K"]:
        batch = images.to_float(layout[None])
        batch = pad(batch, whole_batch(self.pipeline, 1))
        tokens = np.asarray(self.pipeline.autoencoder.encode(batch))[:1, :num_kept]
        return np.repeat(tokens, self.batch_size, axis=0)


def read_upload(path: str, size: int, max_bytes: int) -> UInt8[np.ndarray, "H W 3"]:
    """Read an uploaded picture and crop its middle to `size` pixels a side.

    Raises:
        ValueError: the file is too large, or is not a picture that can be read.
    """
    file = pathlib.Path(path)
    num_bytes = file.stat().st_size
    if num_bytes > max_bytes:
        raise ValueError(
            f"{file.name} has {num_bytes / MEGABYTE:.1f} MB, "
            f"at most {max_bytes / MEGABYTE:g} MB are taken"
        )
    try:
        pixels = decode(file.read_bytes(), file.name, formats=FORMATS, max_pixels=MAX_PIXELS)
    except UnreadablePictureError as error:
        raise ValueError(f"{error} (expected {', '.join(FORMATS)})") from error
    return center_crop(pixels, size)
