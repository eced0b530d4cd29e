"""Files here and in buckets: written whole, once, and read as they were."""

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dar_jax.common import digests, storage
from dar_jax.common.files import read_regular, replacing, write_json

OUTAGE_S = 1.0


def test_file_is_created_once_grows_and_is_found(anywhere):
    assert storage.create(anywhere / "a", "first") and not storage.create(anywhere / "a", "2nd")
    for line in (b"1\n", b"2\n"):
        storage.append(anywhere / "lines", line)
    storage.make_directory(anywhere / "below")
    write_json(anywhere / "below" / "b.json", {"c": 1})
    assert read_regular(anywhere / "a", 5) == b"first"
    assert read_regular(anywhere / "lines", 4) == b"1\n2\n"
    with pytest.raises(OSError, match="more than 3"):
        read_regular(anywhere / "lines", 3)
    with pytest.raises(FileNotFoundError):
        read_regular(anywhere / "none", 3)
    names = [p.relative_to(anywhere).as_posix() for p in storage.files_below(anywhere)]
    assert names == ["a", "below/b.json", "lines"]
    assert {path.name for path in storage.entries(anywhere)} == {"a", "below", "lines"}
    storage.delete_tree(anywhere / "below")
    assert not (anywhere / "below").exists() and storage.entries(anywhere / "below") == []


def test_look_at_a_bucket_leaves_nothing_though_an_earlier_one_was_killed(in_bucket):
    (in_bucket / f".writable-{socket.gethostname()}").write_text("")
    storage.check_writable(in_bucket)
    assert storage.entries(in_bucket) == []


def test_failed_write_leaves_what_was_there(anywhere):
    storage.create(anywhere / "a", "first")

    def fail():
        with replacing(anywhere / "a") as temporary:
            temporary.write_text("half of")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert read_regular(anywhere / "a", 5) == b"first"
    assert [path.name for path in storage.entries(anywhere)] == ["a"]


def test_digests_find_damage(anywhere):
    storage.create(anywhere / "a", "first")
    storage.make_directory(anywhere / "below")
    storage.create(anywhere / "below" / "b", "second")
    digests.write(anywhere)
    assert digests.find_damage(anywhere) == ""
    (anywhere / "below" / "b").write_text("other")
    assert digests.find_damage(anywhere) == "the content of below/b has changed"
    (anywhere / "below" / "b").unlink()
    assert digests.find_damage(anywhere) == "below/b is missing"


def test_bucket_that_does_not_answer_for_a_while_costs_nothing(emulator, in_bucket, tmp_path):
    (tmp_path / "large").write_bytes(os.urandom(2**25 + 1))  # in more than one request
    for use in (
        lambda: storage.upload(tmp_path / "large", in_bucket / "large"),
        lambda: storage.create(in_bucket / "small", "in one request"),
        lambda: storage.download(in_bucket, ["large", "small"], tmp_path / "copy"),
        lambda: storage.files_below(in_bucket),
    ):
        emulator.kill()
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(use)
            time.sleep(OUTAGE_S)
            assert not done.done()
            emulator.start()
            done.result()
    assert (tmp_path / "copy" / "large").read_bytes() == (tmp_path / "large").read_bytes()
    assert (tmp_path / "copy" / "small").read_text() == "in one request"


def test_bucket_that_does_not_answer_at_all_is_an_error(emulator, in_bucket, monkeypatch):
    system = storage._connect(in_bucket)
    monkeypatch.setattr(system, "patience", 1.0, raising=False)
    monkeypatch.setattr(type(system), "retries", 1)  # of its library
    emulator.kill()
    try:
        with pytest.raises(OSError, match="the bucket does not answer as it should"):
            (in_bucket / "a").write_text("")
    finally:
        emulator.start()
