"""The client of Google's buckets."""

import os
from unittest import mock

from dar_jax.common import storage
from tests.emulator import folder_in


def test_upload_whose_session_the_bucket_has_lost_begins_anew(gs, tmp_path):
    (tmp_path / "large").write_bytes(os.urandom(6 * 2**20))  # in more than one request
    where = folder_in(gs)
    system, lost = storage._connect(where), []
    call = type(system)._call

    async def losing(self, method, path, *arguments, **options):
        if "upload_id=" in path and method == "POST" and not lost:
            lost.append(path)
            gs.kill()
            gs.start()
        return await call(self, method, path, *arguments, **options)

    with mock.patch.object(type(system), "_call", losing):
        storage.upload(tmp_path / "large", where / "large")
        (where / "small").write_text("in one request")
    assert len(lost) == 1
    assert (where / "large").read_bytes() == (tmp_path / "large").read_bytes()
    assert (where / "small").read_text() == "in one request"
