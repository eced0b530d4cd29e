"""The client of buckets: tries for minutes, asks for what is there, and raises OSError.

An upload of several requests is a session, of which a server that was started again knows nothing:
such an upload begins anew. What is written like a file is sent in one request when it is closed.
"""

import io
import logging as python_logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import gcsfs  # pyright: ignore[reportMissingImports]  # the extra `gcs`
from absl import logging
from gcsfs.retry import HttpError, is_retriable  # pyright: ignore[reportMissingImports]

PATIENCE_SECONDS = 300.0
"""For which a request is tried again; TensorStore, which checkpoints go through, waits longer."""


SESSION = "upload_id="
"""What the address of a session has in it."""


class PatientBuckets(gcsfs.GCSFileSystem):
    """Its own retries end after half a minute, and it remembers what folders had.

    Attributes:
        patience: seconds for which a request that fails is tried again after that.
    """

    patience = PATIENCE_SECONDS

    def __init__(self, **options: Any):
        # Others write to the bucket, and so does TensorStore.
        super().__init__(**{**options, "use_listings_cache": False})
        python_logging.getLogger("gcsfs").setLevel(python_logging.CRITICAL)

    async def _call(self, *args: Any, **options: Any) -> Any:
        end = time.monotonic() + self.patience
        while True:
            try:
                return await super()._call(*args, **options)
            except Exception as error:
                is_refused = (
                    isinstance(error, HttpError) and str(getattr(error, "code", "")) == "401"
                )
                if not is_refused and not is_retriable(error):
                    raise  # what others look for, such as a file that is missing
                reason = " ".join(str(error).split()) or type(error).__name__
                if is_refused or time.monotonic() > end:
                    raise OSError(f"the bucket does not answer as it should ({reason})") from error
                logging.warning("The bucket does not answer, trying again: %s", reason)

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
                if SESSION not in str(error) or time.monotonic() > end:
                    raise
                logging.warning("The bucket has lost an upload, which begins anew")


class _WholeFile(io.BytesIO):
    """A file that becomes an object when it is closed; small ones are written so."""

    def __init__(self, system: PatientBuckets, path: str):
        super().__init__()
        self._system, self._path = system, path

    def close(self) -> None:
        if not self.closed:
            content = self.getvalue()
            super().close()
            self._system.pipe_file(self._path, content)
