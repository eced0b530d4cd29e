"""What the clients of all buckets have in common: they try for minutes, and raise OSError.

An upload of several requests is a session, which a server may lose: such an upload begins anew.
What is written like a file is sent in one request when it is closed.
"""

import asyncio
import io
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from absl import logging
from fsspec import asyn

PATIENCE_SECONDS = 300.0
"""For which a request is tried again; TensorStore, which checkpoints go through, waits longer."""
PAUSES_SECONDS = (0.2, 5.0)
"""Between two tries: the first, of which each is twice the one before, and the longest."""


class Patient(asyn.AsyncFileSystem):
    """The first base class of a client, before that of its library.

    Attributes:
        patience: seconds for which a request that fails is tried again.
        brief: the same for the looks at the beginning of a run, when nothing is lost.
        may_ignore_conditions: there are services that create what is there already.
    """

    patience = PATIENCE_SECONDS
    brief = 0.0
    may_ignore_conditions = False

    def changed(self, about: Mapping[str, Any]) -> float:
        """Return the time of the last change of an object, in seconds since 1970.

        Args:
            about: what the service says of the object.
        """
        raise NotImplementedError

    def is_passing(self, error: Exception) -> bool:
        """Tell whether what a request failed of may be over soon."""
        raise NotImplementedError

    def is_unusual(self, error: Exception) -> bool:
        """Tell whether it is something that nobody looks for, and that is to be an OSError."""
        raise NotImplementedError

    def has_lost_upload(self, error: FileNotFoundError) -> bool:
        """Tell whether what is missing is the session of an upload."""
        raise NotImplementedError

    async def _patiently(
        self, request: Callable[..., Awaitable[Any]], *args: Any, **options: Any
    ) -> Any:
        """Make a request, again and again.

        Raises:
            OSError: it fails for so long, or of what will not pass.
        """
        end = time.monotonic() + self.patience
        pause, longest = PAUSES_SECONDS
        while True:
            try:
                return await request(*args, **options)
            except Exception as error:
                is_passing = self.is_passing(error)
                if not is_passing and not self.is_unusual(error):
                    raise  # what others look for, such as a file that is missing
                reason = " ".join(str(error).split()) or type(error).__name__
                if not is_passing or time.monotonic() > end:
                    raise OSError(f"the bucket does not answer as it should ({reason})") from error
                logging.warning("The bucket does not answer, trying again: %s", reason)
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    def _open(self, path: str, mode: str = "rb", *args: Any, **options: Any) -> Any:
        if mode == "wb":
            return _WholeFile(self, path)
        return super()._open(path, mode, *args, **options)

    async def _put_file(self, *args: Any, **options: Any) -> Any:
        return await self._begin_anew(super()._put_file, *args, **options)

    async def _pipe_file(self, *args: Any, **options: Any) -> Any:
        return await self._begin_anew(super()._pipe_file, *args, **options)

    async def _begin_anew(
        self, upload: Callable[..., Awaitable[Any]], *args: Any, **options: Any
    ) -> Any:
        end = time.monotonic() + self.patience
        while True:
            try:
                return await upload(*args, **options)
            except FileNotFoundError as error:
                if not self.has_lost_upload(error) or time.monotonic() > end:
                    raise
                logging.warning("The bucket has lost an upload, which begins anew")


class _WholeFile(io.BytesIO):
    """A file that becomes an object when it is closed; small ones are written so."""

    def __init__(self, system: Any, path: str):
        super().__init__()
        self._system, self._path = system, path

    def close(self) -> None:
        if not self.closed:
            content = self.getvalue()
            super().close()
            self._system.pipe_file(self._path, content)
