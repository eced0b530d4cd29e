"""The page of the demo, in gradio: inputs, previews as they come, a layout, a gallery.

Nothing is reported or fetched: no analytics, the system's own fonts.
"""

import functools
import queue
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports] - of the extra `demo`
import numpy as np
from absl import logging

from dar_jax.common.typing import UInt8
from dar_jax.demo import html
from dar_jax.demo.batch import (
    MAX_GUIDANCE,
    MAX_SEED,
    MAX_TEMPERATURE,
    BatchGenerator,
    PixelPreview,
    Request,
    read_upload,
)
from dar_jax.generation.batches import class_name
from dar_jax.serving.engine import Engine, Ticket
from dar_jax.serving.errors import ApiError

DEFAULT_CLASSES = 4
SMALL_IMAGE = 128
"""Pixels a side below which an image is enlarged without smoothing."""
GALLERY_SIZE = 48
LAYOUT_PART = 1 / 16
"""Of the tokens, which as a layout leaves the class to be seen."""
LAYOUT_INFO = (
    "Few keep where things are and leave the rest to the class or prompt; the more are kept, the "
    "more the images are the picture itself, whatever is asked for."
)
SHOW_RESULT = """() => {
  const result = document.querySelector('#status'), top = result.getBoundingClientRect().top;
  if (top < 0 || top > window.innerHeight / 2) result.scrollIntoView();
}"""
"""On a narrow window the result is below what is asked for."""
HOUR = 3600
SPARE_THREADS = 40
"""Besides those that wait for previews."""
LOOK_SECONDS = 0.5
"""Between two looks at how many requests are still before one."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")
FONT, MONOSPACED = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
PRIVATE: dict[str, Any] = dict(api_visibility="private", show_progress="hidden")
"""Events are the page's own."""

History = list[tuple[UInt8[np.ndarray, "H W 3"], str]]
Drawn = Sequence[int] | str
"""Classes, or prompts as somebody wrote them."""


class Page:
    """The components and what they do; `blocks` is the whole.

    A page that somebody has open is one owner in the engine, with one request.
    """

    def __init__(self, generator: BatchGenerator, engine: Engine, max_upload_bytes: int):
        self._generator = generator
        self._engine = engine
        self._tickets: dict[str, Ticket] = {}
        self._max_upload_bytes = max_upload_bytes
        pipeline = generator.pipeline
        self._size = pipeline.image_size
        self._num_classes = pipeline.num_classes
        self._name = functools.partial(class_name, pipeline)
        self._style = ["pixelated"] if self._size < SMALL_IMAGE else []
        unit = "token" if generator.num_tokens else "step"
        title = f"Images that grow {unit} by {unit}"
        self.blocks = gr.Blocks(
            title=title, analytics_enabled=False, delete_cache=(HOUR, 24 * HOUR)
        )
        with self.blocks:
            gr.Markdown(f"# {title}\n{self._description()}")
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    self._add_inputs()
                with gr.Column(scale=3, min_width=300):
                    self._add_outputs()
            self._connect()
            if generator.kept_choices:
                self._connect_layout()

    def launch(self, host: str, port: int, max_requests: int) -> None:
        """Serve the page in threads of its own, to so many requests at a time.

        Raises:
            ValueError: host or port cannot be bound.
        """
        try:
            self.blocks.launch(
                server_name=host,
                server_port=port,
                max_file_size=self._max_upload_bytes,
                max_threads=max_requests + SPARE_THREADS,
                theme=gr.themes.Default(primary_hue="indigo", font=FONT, font_mono=MONOSPACED),
                css=html.CSS,
                footer_links=[],
                share=False,
                ssr_mode=False,
                quiet=True,
                prevent_thread_lock=True,
            )
        except OSError as error:
            raise ValueError(f"cannot serve on {host}:{port}: {error}") from error
        logging.info("The demo is at %s (Ctrl-C ends it)", self.blocks.local_url)
        if host not in LOOPBACK:
            logging.warning("host=%s: everybody who can reach this computer can use the demo", host)

    def _description(self) -> str:
        what = "Prompts" if self._generator.prompts else f"{self._num_classes} classes"
        sizes = f"{what}, {self._size} x {self._size} pixels"
        if not self._generator.num_tokens:
            return f"{sizes}, {self._generator.num_steps} steps of diffusion."
        return (
            f"{sizes}, {self._generator.num_tokens} tokens. Every group of tokens conditions steps "
            "of diffusion: a preview is there long before the last token."
        )

    def _add_inputs(self) -> None:
        most = self._generator.batch_size
        prompts = self._generator.prompts[:most]
        shown = len(prompts) or min(DEFAULT_CLASSES, self._num_classes, most)
        defaults = self._generator.default_request(tuple(range(shown)))
        if prompts:
            self._drawn = gr.Textbox("\n".join(prompts), lines=3, label="Prompts, one a line")
        else:
            self._drawn = gr.Dropdown(
                [(self._name(label), label) for label in range(self._num_classes)],
                value=list(defaults.labels),
                multiselect=True,
                max_choices=most,
                label="Classes",
            )
        self._per_class = gr.Slider(
            1, value=most // shown, step=1, label="Images of each", **self._counts(shown)
        )
        with gr.Row():
            self._go = gr.Button("Generate", variant="primary", min_width=140)
            self._stop = gr.Button("Cancel", variant="stop", min_width=100, interactive=False)
        guidance = dict(minimum=1, maximum=MAX_GUIDANCE, step=0.1)
        first, last = defaults.guidance_scale[0], defaults.guidance_scale[-1]
        is_ramp = self._generator.num_scales > 1
        label = "Guidance, first token" if is_ramp else "Guidance"
        self._first = gr.Slider(value=first, label=label, **guidance)
        self._last = gr.Slider(
            value=last, label="Guidance, last token", visible=is_ramp, **guidance
        )
        self._temperature = gr.Slider(
            0,
            MAX_TEMPERATURE,
            defaults.temperature,
            step=0.05,
            label="Temperature",
            visible=hasattr(self._generator.sampling, "temperature"),
        )
        with gr.Row():
            self._seed = gr.Number(defaults.seed, label="Seed", precision=0, min_width=140)
            self._keep_seed = gr.Checkbox(False, label="Keep the seed", min_width=140)
        self._drawn_seed = gr.State(None)
        self._add_layout_inputs()

    def _add_layout_inputs(self) -> None:
        choices = self._generator.kept_choices
        self._layout = gr.State(None)
        with gr.Accordion("Keep the layout of a picture", open=False, visible=bool(choices)):
            self._file = gr.File(label="Picture", file_types=["image"], height=130)
            gr.Markdown("Or click on a picture in the gallery.")
            self._layout_view = gr.HTML(elem_classes=self._style, elem_id="layout")
            self._num_kept = gr.Radio(
                choices,
                value=min(choices, key=self._distance_to_layout, default=None),
                label=f"First tokens that are kept, of {self._generator.num_tokens}",
                info=LAYOUT_INFO,
            )
            self._no_layout = gr.Button("Forget the layout", size="sm")

    def _distance_to_layout(self, num_kept: int) -> float:
        return abs(num_kept - LAYOUT_PART * self._generator.num_tokens)

    def _add_outputs(self) -> None:
        empty = html.tiles([""] * self._generator.batch_size)
        self._status = gr.HTML(html.status(0.0, "Press Generate."), elem_id="status")
        self._images = gr.HTML(empty, elem_classes=self._style, elem_id="images")
        self._history = gr.State([])
        self._gallery = gr.Gallery(
            label="Gallery",
            height="auto",
            format="png",
            allow_preview=False,
            elem_classes=self._style,
            elem_id="gallery",
        )

    def _connect(self) -> None:
        self._go.click(js=SHOW_RESULT, **PRIVATE)
        self._go.click(
            self._generate,
            [
                *(self._drawn, self._per_class, self._first, self._last, self._temperature),
                *(self._seed, self._drawn_seed, self._keep_seed),
                *(self._layout, self._num_kept, self._history),
            ],
            [
                *(self._go, self._stop, self._seed, self._drawn_seed),
                *(self._status, self._images, self._history, self._gallery),
            ],
            concurrency_limit=None,  # the engine has its own
            **PRIVATE,
        )
        counts = [self._drawn, self._per_class]
        self._drawn.change(self._limit_per_class, counts, self._per_class, queue=False, **PRIVATE)
        self._stop.click(self._cancel, queue=False, **PRIVATE)
        self.blocks.unload(self._cancel)

    def _counts(self, number: int) -> dict[str, Any]:
        """Let no more images of so many labels be asked for than are made at a time."""
        most = self._generator.batch_size // max(1, number)
        return dict(maximum=max(2, most), visible=most > 1)  # 1 is no choice

    def _limit_per_class(self, drawn: Drawn, per_class: int) -> gr.Slider:
        limits = self._counts(len(_one_by_one(drawn)))
        return gr.Slider(
            value=min(per_class, limits["maximum"] if limits["visible"] else 1), **limits
        )

    def _connect_layout(self) -> None:
        views = [self._layout, self._layout_view]
        self._file.upload(self._take_upload, self._file, [*views, self._file], **PRIVATE)
        self._no_layout.click(lambda: (None, ""), outputs=views, **PRIVATE)
        self._gallery.select(self._take_from_gallery, self._history, views, **PRIVATE)

    def _generate(
        self,
        drawn: Drawn,
        per_class: int,
        first: float | int,
        last: float | int,
        temperature: float | int,
        seed: int | None,
        drawn_seed: int | None,
        keep_seed: bool,
        layout: UInt8[np.ndarray, "H W 3"] | None,
        num_kept: int | None,
        history: History,
        http: gr.Request,
    ) -> Iterator[dict]:
        """Yield what changes on the page while a request waits and is served."""
        labels = tuple(label for label in _one_by_one(drawn) for _ in range(per_class))
        try:
            if seed is None:
                raise ValueError("the seed must be a whole number")
            if seed == drawn_seed and not keep_seed:
                seed = 0 if seed == MAX_SEED else seed + 1
            scales = (float(first), float(last))[: self._generator.num_scales]
            request = Request(labels, scales, float(temperature), seed, layout, num_kept or 0)
            self._generator.check(request)
            if (owner := str(http.session_hash)) in self._tickets:
                raise ValueError("your last request is not done yet: wait for it or cancel it")
            updates = queue.SimpleQueue()
            ticket = self._tickets[owner] = self._engine.submit(owner, request, updates.put)
        except (ValueError, ApiError) as error:
            yield {self._status: html.problem(str(error))}
            return
        names = [*map(self._name, labels)]
        yield {
            self._go: gr.Button(interactive=False),
            self._stop: gr.Button(interactive=True),
            self._seed: seed,
            self._drawn_seed: seed,
            self._images: html.tiles(names),
        }
        try:
            yield from self._follow(ticket, updates, names, history)
        finally:
            self._engine.cancel(ticket)
            if self._tickets.get(owner) is ticket:
                del self._tickets[owner]
        yield {self._go: gr.Button(interactive=True), self._stop: gr.Button(interactive=False)}

    def _follow(
        self, ticket: Ticket, updates: queue.SimpleQueue, names: Sequence[str], history: History
    ) -> Iterator[dict]:
        previews, facts = [], []
        while (update := self._next(ticket, updates)) is not None:
            if isinstance(update, ApiError):
                yield {self._status: html.problem(update.message)}
                return
            if isinstance(update, int):
                if not previews:
                    yield {self._status: html.status(0.0, _describe(update))}
                continue
            previews.append(update)
            facts = self._facts(update, previews[0].seconds)
            yield {
                self._status: html.status(update.step / self._generator.num_steps, *facts),
                self._images: html.tiles(names, update.pixels),
            }
        if ticket.missing:
            yield {self._status: html.status(0.0, "Cancelled.", *facts)}
            return
        last = previews[-1]
        captions = [f"{name}, seed {ticket.request.seed}" for name in names]
        history = _file(zip(last.pixels, captions, strict=True), history)
        done = f"done in {last.seconds:.2f} s"
        yield {
            self._status: html.status(1.0, *facts, done),
            self._history: history,
            self._gallery: history,
        }

    def _next(self, ticket: Ticket, updates: queue.SimpleQueue) -> Any:
        """Wait for an update; in between tell the number of requests before this one."""
        try:
            return updates.get(timeout=LOOK_SECONDS)
        except queue.Empty:
            return self._engine.num_before(ticket)

    def _facts(self, preview: PixelPreview, first_seconds: float) -> list[str]:
        num_tokens = self._generator.num_tokens
        tokens = [f"{preview.num_tokens} of {num_tokens} tokens"] if num_tokens else []
        return [
            *tokens,
            f"step {preview.step} of {self._generator.num_steps}",
            f"first preview after {first_seconds:.2f} s",
        ]

    def _cancel(self, http: gr.Request) -> None:
        if ticket := self._tickets.pop(str(http.session_hash), None):
            self._engine.cancel(ticket)

    def _take_upload(self, path: str) -> tuple:
        """Return the layout, its view, and no file: what is kept of it is seen."""
        try:
            pixels = read_upload(path, self._size, self._max_upload_bytes)
        except ValueError as error:
            return None, html.problem(str(error)), None
        return pixels, html.layout(pixels), None

    def _take_from_gallery(self, history: History, event: gr.SelectData) -> tuple:
        pixels, _ = history[event.index]
        return pixels, html.layout(pixels)


def _file(images: Iterable[tuple[UInt8[np.ndarray, "H W 3"], str]], history: History) -> History:
    """Put images before those of the gallery that are others."""
    new = [*images]
    drawn = {pixels.tobytes() for pixels, _ in new}
    return [*new, *(one for one in history if one[0].tobytes() not in drawn)][:GALLERY_SIZE]


def _one_by_one(drawn: Drawn) -> Sequence[int] | Sequence[str]:
    """Return the classes as they are, of a text the lines that are not blank."""
    if isinstance(drawn, str):
        return [*filter(None, (" ".join(line.split()) for line in drawn.split("\n")))]
    return drawn


def _describe(ahead: int) -> str:
    if not ahead:
        return "Drawing the first preview ..."
    return f"Waiting: {ahead} request{'s' * (ahead > 1)} before this one"
