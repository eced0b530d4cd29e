"""The client of buckets: tries for minutes, asks for what is there, and raises OSError."""

import logging as python_logging
import time
from typing import Any

import gcsfs  # pyright: ignore[reportMissingImports]  # the extra `gcs`
from absl import logging
from gcsfs.retry import HttpError, is_retriable  # pyright: ignore[reportMissingImports]

PATIENCE_SECONDS = 300.0
"""For which a request is tried again; TensorStore, which checkpoints go through, waits longer."""


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
