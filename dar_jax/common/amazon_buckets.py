"""The client of buckets of Amazon S3 and of what speaks its protocol."""

import asyncio
import io
import os
import time
import zlib
from collections.abc import Mapping
from typing import Any

import aiohttp  # pyright: ignore[reportMissingImports]  # comes with s3fs
import s3fs  # pyright: ignore[reportMissingImports]  # the extra `s3`
from botocore import exceptions, parsers  # pyright: ignore[reportMissingImports]

from dar_jax.common.patient_buckets import Patient

PASSING = (
    *(exceptions.HTTPClientError, exceptions.ConnectionError, parsers.ResponseParserError),
    *(exceptions.CredentialRetrievalError, aiohttp.ClientError, asyncio.TimeoutError),
)
PASSING_CODES = (
    *("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests"),
    *("ConditionalRequestConflict", "OperationAborted"),  # others wrote at the same time
)
NOT_IMPLEMENTED = 501
SMALL_BYTES = 2**23
"""What has no more is read in one request, other files in pieces of so much."""
PART_BYTES = 2**24
MAX_PARTS = 10_000
"""Of which a file is made that is sent in several requests."""
MAX_PARTS_AT_ONCE = 4
"""Of each file, in memory."""


class Buckets(Patient, s3fs.S3FileSystem):
    """Its own retries end after seconds, and it remembers what folders had.

    Credentials, region and address of the service (`AWS_ENDPOINT_URL`) are those of the environment
    and of AWS's files.
    """

    brief = 10.0
    may_ignore_conditions = True

    def __init__(self, **options: Any):
        settings = {
            "use_listings_cache": False,  # others write to the bucket
            "config_kwargs": {"retries": {"total_max_attempts": 1}},  # these would hide ours
            "default_block_size": SMALL_BYTES,
            "max_concurrency": MAX_PARTS_AT_ONCE,
        }
        super().__init__(**{**options, **settings})

    def changed(self, about: Mapping[str, Any]) -> float:
        # In whole seconds; the rest tells two versions of the same second apart.
        version = zlib.crc32(about["ETag"].encode()) % 1000
        return int(about["LastModified"].timestamp()) + version / 1000

    def is_passing(self, error: Exception) -> bool:
        response = getattr(error.__cause__ or error, "response", None)
        if response is None:
            return isinstance(error, PASSING)
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        is_busy = status >= 500 and status != NOT_IMPLEMENTED
        return is_busy or status == 429 or _code(error) in PASSING_CODES

    def is_unusual(self, error: Exception) -> bool:
        return isinstance(error, exceptions.BotoCoreError)

    def has_lost_upload(self, error: FileNotFoundError) -> bool:
        return _code(error) == "NoSuchUpload"

    async def _call_s3(self, *args: Any, **options: Any) -> Any:
        answer = await self._patiently(super()._call_s3, *args, **options)
        for failed in answer.get("Errors", []) if isinstance(answer, dict) else ():
            # Of several objects to delete; the library passes over it.
            raise PermissionError(f"{failed.get('Key')}: {failed.get('Message')}")
        return answer

    async def _cat_file(self, *args: Any, **options: Any) -> Any:
        return await self._patiently(super()._cat_file, *args, **options)

    def _open(self, path: str, mode: str = "rb", *args: Any, **options: Any) -> Any:
        if mode != "rb":
            return super()._open(path, mode, *args, **options)
        if self.info(path)["size"] > SMALL_BYTES:
            return _File(self, path, mode, block_size=SMALL_BYTES)
        # Of what is written anew in the meantime the old or the new is read; a file would fail.
        content: Any = self.cat_file(path, max_concurrency=1)
        return io.BytesIO(content)

    async def _put_file(self, lpath: str, rpath: str, **options: Any) -> Any:
        size = os.path.getsize(lpath)
        return await super()._put_file(
            lpath, rpath, **{"chunksize": max(PART_BYTES, -(-size // MAX_PARTS)), **options}
        )


class _File(s3fs.S3File):
    """A large object; what comes of it may break off at any time."""

    def _fetch_range(self, start: int, end: int) -> Any:
        until = time.monotonic() + self.fs.patience
        while True:
            try:
                return super()._fetch_range(start, end)
            except PASSING as error:
                if time.monotonic() > until:
                    raise OSError(f"the bucket does not answer as it should ({error})") from error


def _code(error: Exception) -> str:
    response = getattr(error.__cause__ or error, "response", None) or {}
    return response.get("Error", {}).get("Code", "")
