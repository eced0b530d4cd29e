"""The client of Amazon's buckets: what it tries again, and what it does not."""

import os
import re
import subprocess
import sys
from unittest import mock

import pytest

from dar_jax.common import storage
from tests.emulator import folder_in

NO_CREDENTIALS = """
from dar_jax.common import storage
try:
    storage.check_writable(storage.to_path("s3://bucket/run"))
except ValueError as error:
    print(error)
"""


@pytest.fixture
def where(s3):
    return folder_in(s3)


@pytest.fixture
def answering(where):
    """Let requests of a name be answered with errors before they are made."""
    import s3fs
    from botocore.exceptions import ClientError

    call, errors, asked = s3fs.S3FileSystem._call_s3, [], []

    async def failing(self, method, *arguments, **options):
        asked.append(method)
        if errors and errors[0][0] == method:
            _, code, status = errors.pop(0)
            answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
            raise s3fs.errors.translate_boto_error(ClientError(answer, method))
        return await call(self, method, *arguments, **options)

    def answer(*more):
        errors.extend(more)
        return asked

    with mock.patch.object(s3fs.S3FileSystem, "_call_s3", failing):
        yield answer


def test_what_may_pass_is_tried_again(where, answering):
    asked = answering(
        *(("put_object", code, status) for code, status in (("SlowDown", 503), ("", 500))),
        *(("put_object", "ConditionalRequestConflict", 409), ("put_object", "Throttling", 429)),
        ("put_object", "RequestTimeout", 400),
    )
    assert storage.create(where / "a", "text")
    assert asked == ["put_object"] * 6
    assert (where / "a").read_text() == "text"


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("AccessDenied", 403, PermissionError),
        ("NoSuchBucket", 404, FileNotFoundError),
        ("NotImplemented", 501, OSError),
    ],
)
def test_what_will_not_pass_is_not(code, status, kind, where, answering):
    asked = answering(("put_object", code, status))
    with pytest.raises(kind):
        (where / "a").write_text("text")
    assert asked == ["put_object"]


def test_upload_that_the_bucket_has_lost_begins_anew(where, answering, tmp_path):
    (tmp_path / "large").write_bytes(os.urandom(2**25 + 1))  # in more than one request
    asked = answering(("upload_part", "NoSuchUpload", 404))
    storage.upload(tmp_path / "large", where / "large")
    assert asked.count("create_multipart_upload") == 2
    assert (where / "large").read_bytes() == (tmp_path / "large").read_bytes()


def test_file_that_is_written_anew_while_it_is_read_is_the_old_or_the_new(where, monkeypatch):
    (where / "a").write_text("first")
    system = storage._connect(where)
    info = system.info

    def changing(*arguments, **options):
        found = info(*arguments, **options)
        (where / "a").write_text("and second")
        return found

    monkeypatch.setattr(system, "info", changing)
    with storage.open_binary(where / "a") as file:
        assert file.read() == b"and second"


def test_service_that_creates_what_is_there_is_refused(where, monkeypatch):
    system = storage._connect(where)
    pipe_file = system.pipe_file
    monkeypatch.setattr(
        system, "pipe_file", lambda path, data, mode="overwrite": pipe_file(path, data)
    )
    with pytest.raises(ValueError, match=rf"cannot use {where}: it ignores If-None-Match and"):
        storage.check_writable(where)


def test_objects_that_may_not_be_deleted_are_an_error(where):
    import s3fs

    async def refusing(self, method, *arguments, **options):
        return {"Errors": [{"Key": "run/a", "Message": "Access Denied"}]}

    (where / "a").write_text("")
    with (
        mock.patch.object(s3fs.S3FileSystem, "_call_s3", refusing),
        pytest.raises(PermissionError, match="run/a: Access Denied"),
    ):
        (where / "a").unlink()


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({}, "Unable to locate credentials"),
        ({"AWS_PROFILE": "nobody"}, r"The config profile \(nobody\) could not be found"),
        ({"AWS_ENDPOINT_URL": "nowhere"}, "Invalid endpoint: nowhere"),
    ],
)
def test_credentials_that_are_not_there_are_one_line(variables, reason, s3, tmp_path):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("AWS_ACCESS")}
    done = subprocess.run(
        [sys.executable, "-c", NO_CREDENTIALS],
        env={**kept, "HOME": str(tmp_path), **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = done.stdout.splitlines()
    assert line.startswith("cannot use s3://bucket/run: ")
    assert line.endswith("AWS_ENDPOINT_URL names a service that is not AWS's")
    assert re.search(reason, line), line
