"""What the API answers with: JSON, or server-sent events as the images grow."""

import asyncio
import contextlib
import json
import time
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from dar_jax.serving.drawing import Piece
from dar_jax.serving.errors import ApiError
from dar_jax.serving.inputs import AUTO, Offer, Wanted
from dar_jax.serving.pictures import encode

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Let no proxy collect events."""


class EventStream(StreamingResponse):
    """Server-sent events, given up after some time: whoever reads so slowly is cut off."""

    def __init__(self, content: Any, seconds: float):
        super().__init__(content, media_type="text/event-stream", headers=HEADERS)
        self._seconds = seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._seconds):
                await super().__call__(scope, receive, send)


def event(name: str, data: dict[str, Any]) -> str:
    """Return one server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


class Answer:
    """The answers to one request.

    Attributes:
        what: "image_generation" or "image_edit": what its events are called.
    """

    def __init__(self, what: str, wanted: Wanted, offer: Offer):
        self.what = what
        self._wanted = wanted
        self._offer = offer
        self._num_partial = [0] * len(wanted.request.labels)

    async def event(self, update: Piece | ApiError) -> str:
        """Return the event of a preview, an image or an error."""
        if isinstance(update, ApiError):
            return event("error", {"type": "error", **update.to_json()})
        data = {
            "b64_json": await run_in_threadpool(encode, update.pixels, self._wanted.output),
            "image_index": update.image,
            **self._facts("created_at"),
        }
        if update.is_last:
            kind, own = "completed", {"usage": self._usage(1)}
        else:
            kind, own = "partial_image", {"partial_image_index": self._num_partial[update.image]}
            self._num_partial[update.image] += 1
        name = f"{self.what}.{kind}"
        return event(name, {"type": name, **data, **own})

    async def json(self, pieces: list[Piece]) -> dict[str, Any]:
        """Return all images in one body."""
        pieces = sorted(pieces, key=lambda piece: piece.image)
        output = self._wanted.output
        files = [await run_in_threadpool(encode, piece.pixels, output) for piece in pieces]
        return {
            **self._facts("created"),
            "data": [{"b64_json": file} for file in files],
            "usage": self._usage(len(files)),
        }

    def _facts(self, created: str) -> dict[str, Any]:
        return {
            created: int(time.time()),
            "size": f"{self._offer.size}x{self._offer.size}",
            "quality": AUTO,
            "background": "opaque",
            "output_format": self._wanted.output.format,
            "seed": self._wanted.request.seed,
        }

    def _usage(self, num_images: int) -> dict[str, Any]:
        """Count tokens: a class is one, images have those that they are drawn from."""
        drawn = num_images * self._offer.num_tokens
        return {
            "input_tokens": num_images,
            "input_tokens_details": {"image_tokens": 0, "text_tokens": num_images},
            "output_tokens": drawn,
            "total_tokens": num_images + drawn,
        }
