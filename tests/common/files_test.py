"""Reading what must be a file."""

import os

import pytest

from dar_jax.common.files import read_regular


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
