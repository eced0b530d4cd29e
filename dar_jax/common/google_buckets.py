"""The client of buckets of Google Cloud Storage."""

import logging as python_logging
from collections.abc import Mapping
from typing import Any

import gcsfs  # pyright: ignore[reportMissingImports]  # the extra `gcs`
from gcsfs.retry import HttpError, is_retriable  # pyright: ignore[reportMissingImports]

from dar_jax.common.patient_buckets import Patient

SESSION = "upload_id="
"""What the address of a session has in it."""


class Buckets(Patient, gcsfs.GCSFileSystem):
    """Its own retries end after half a minute, and it remembers what folders had."""

    def __init__(self, **options: Any):
        # Others write to the bucket, and so does TensorStore.
        super().__init__(**{**options, "use_listings_cache": False})
        python_logging.getLogger("gcsfs").setLevel(python_logging.CRITICAL)

    def changed(self, about: Mapping[str, Any]) -> float:
        return about["mtime"].timestamp()

    def is_passing(self, error: Exception) -> bool:
        return not self.is_unusual(error) and is_retriable(error)

    def is_unusual(self, error: Exception) -> bool:
        return isinstance(error, HttpError) and str(getattr(error, "code", "")) == "401"

    def has_lost_upload(self, error: FileNotFoundError) -> bool:
        return SESSION in str(error)

    async def _call(self, *args: Any, **options: Any) -> Any:
        return await self._patiently(super()._call, *args, **options)
