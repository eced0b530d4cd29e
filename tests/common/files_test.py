"""Reading what must be a file."""

import errno
import os
import socket
import subprocess

import pytest

from dar_jax.common import files
from dar_jax.common.files import read_regular, replacing, sweep, temporary_path


def test_read_regular_returns_the_content_of_a_file_or_of_what_a_link_leads_to(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "b").symlink_to("a")
    assert read_regular(tmp_path / "a", 7) == read_regular(tmp_path / "b", 7) == b"content"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: os.mkfifo(path), "no regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "no regular file"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.write_bytes(bytes(8)), "8 bytes, more than 7"),
        (lambda path: path.symlink_to(path.name), "symbolic links"),
        (lambda path: None, "No such file"),
    ],
)
def test_read_regular_refuses_everything_else_without_waiting(make, reason, tmp_path):
    make(tmp_path / "a")
    with pytest.raises(OSError, match=reason):
        read_regular(tmp_path / "a", 7)


def test_error_of_writing_names_the_file(tmp_path):
    def write():
        with replacing(tmp_path / "a.npz") as temporary:
            temporary.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.npz'"):
        write()
    assert not [*tmp_path.iterdir()]


def test_sweep_deletes_what_dead_processes_were_writing(tmp_path, monkeypatch):
    mine = temporary_path(tmp_path / "a.npz")
    mine.touch()
    with monkeypatch.context() as patch:
        dead = subprocess.Popen(["true"])
        dead.wait()
        patch.setattr(os, "getpid", lambda: dead.pid)
        left = [temporary_path(tmp_path / "below" / name) for name in ("b.png", "model")]
        patch.setattr(files, "host", lambda: f"{socket.gethostname()}-0123abcd")
        theirs = temporary_path(tmp_path / "c.npz")
    (tmp_path / "below").mkdir()
    left[0].touch(), theirs.touch(), (tmp_path / ".hidden-0.npz").touch()
    left[1].mkdir(), (left[1] / "config.json").touch()
    sweep(tmp_path)
    kept = {tmp_path / "below", mine, theirs, tmp_path / ".hidden-0.npz"}
    assert set(tmp_path.rglob("*")) == kept
