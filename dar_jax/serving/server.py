"""The HTTP server around an engine: it ends with it, and lets it finish what is asked for."""

import threading
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from dar_jax.serving.config import ServeConfig
from dar_jax.serving.engine import Engine

LAST_SECONDS = 5
"""To say that there will be no images, after those that requests have to end in."""
CONNECTIONS = 256
"""That may be open besides those that wait for images."""


class Server(uvicorn.Server):
    """See the module's docstring."""

    def __init__(self, app: Starlette, engine: Engine, settings: ServeConfig):
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                server_header=False,
                limit_concurrency=settings.max_waiting + settings.batch_size + CONNECTIONS,
                timeout_graceful_shutdown=int(settings.drain) + LAST_SECONDS,
            )
        )
        self._engine = engine
        self._drain = settings.drain

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._engine.drain()
        closing = threading.Timer(self._drain, self._engine.close)
        closing.daemon = True
        closing.start()
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._engine.failure is not None
