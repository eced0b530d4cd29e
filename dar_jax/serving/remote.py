"""The API in front of replicas: requests are passed on, and asked of another one if it is lost."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from dar_jax.serving.app import arriving, tell
from dar_jax.serving.engine import Engine
from dar_jax.serving.errors import ApiError
from dar_jax.serving.events import event

PASSED_ON = ("type", "method", "path", "raw_path", "query_string", "headers", "client")
"""Of a request, as ASGI has it."""
ATTEMPTS = 2
LOST = ApiError(503, "the replica that was drawing is lost: ask again", code="not_ready")
Message = dict[str, Any]


class Replica:
    """One of them: an application and its engine, of which only those that are ready are asked."""

    def __init__(self, app: Any, engine: Engine):
        """Wait until everything is compiled."""
        self._app, self._engine = app, engine
        engine.start()
        while engine.status == "starting":
            time.sleep(0.1)
        self.check_health()

    def check_health(self) -> None:
        """Raise RuntimeError unless requests are taken."""
        if self._engine.status != "ready":
            raise RuntimeError(f"the engine is {self._engine.status}: {self._engine.failure!r}")

    async def answer(self, scope: Message, body: bytes) -> AsyncIterator[Message]:
        """Yield what the application answers, as ASGI has it; who closes this has left."""
        sent, received = asyncio.Queue(), asyncio.Queue()
        received.put_nowait({"type": "http.request", "body": body})
        task = asyncio.create_task(self._app(scope, received.get, sent.put))
        task.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while (message := await sent.get()) is not None:
                yield message
        finally:
            task.cancel()


class Front:
    """Answers a request with what `ask` yields; the same seed is the same images, whoever draws.

    Attributes:
        ask: a replica's `answer`, wherever it runs.
        lost: what it raises when that is no more.
        limit: bytes of a body.
    """

    def __init__(
        self,
        ask: Callable[[Message, bytes], AsyncIterator[Message]],
        lost: type[Exception],
        limit: int,
    ):
        self.ask, self.lost, self.limit = ask, lost, limit

    async def __call__(self, request: Request) -> Response:
        try:
            async with arriving(request, self.limit) as bounded:
                body = await bounded.body()
            return await self._pass_on(request, body)
        except ApiError as error:
            return await tell(request, error)

    async def _pass_on(self, request: Request, body: bytes) -> Response:
        scope = {name: request.scope[name] for name in PASSED_ON if name in request.scope}
        for _ in range(ATTEMPTS):
            messages = self.ask(scope, body)
            try:  # until there is something to see of it, nobody notices another attempt
                start, first = await anext(messages), await anext(messages)
            except self.lost:
                continue
            response = StreamingResponse(self._rest(first, messages), start["status"])
            response.raw_headers = start["headers"]
            return response
        raise LOST

    async def _rest(self, first: Message, messages: AsyncIterator[Message]) -> AsyncIterator[bytes]:
        """Yield the body; a stream that is cut off ends with an event that says so."""
        yield first.get("body", b"")
        try:
            async for message in messages:
                yield message.get("body", b"")
        except self.lost:
            yield event("error", {"type": "error", **LOST.to_json()}).encode()
