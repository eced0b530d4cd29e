"""Fingerprints of data: equal for equal pictures wherever they are, others for any change."""

import os
import pathlib
import shutil

import pytest

from dar_jax.data import identity
from dar_jax.data.folder import _all_classes as all_classes
from dar_jax.data.folder import _draw as draw
from dar_jax.data.folder import _files as files
from dar_jax.data.folder import find_parts, scan
from dar_jax.data.references import group
from dar_jax.data.sources import DataConfig, load_source
from tests.data import tiny_sets

CONTENT_KEYS = ("pictures", "names", "contents")


def identify(root, source, **data):
    for cache in (find_parts, scan, files, all_classes, draw):
        cache.cache_clear()  # one process does not look twice
    config = DataConfig(source=source, path=str(root), **data)
    return identity.identify(group(load_source(config, "train"), config, 0), num_threads=2)


@pytest.fixture
def folder(tmp_path):
    tiny_sets.make_split_folder(tmp_path / "set")
    return tmp_path / "set"


@pytest.mark.parametrize("form", [name for name in tiny_sets.FORMS if name != "tfds"])
def test_moved_data_are_the_same(tmp_path, form):
    source = tiny_sets.FORMS[form](tmp_path / "set")["source"]
    first = identify(tmp_path / "set", source)
    assert first["pictures"] == tiny_sets.NUM_PICTURES - tiny_sets.NUM_HELD_OUT
    shutil.copytree(tmp_path / "set", tmp_path / "other")  # keeps the times
    assert identify(tmp_path / "other", source) == first


def rename(picture):
    picture.rename(picture.with_name("renamed.png"))


def rewrite(picture):
    """Another content of the same size and time."""
    times = picture.stat()
    content = bytearray(picture.read_bytes())
    content[-1] ^= 1
    picture.write_bytes(content)
    os.utime(picture, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        (lambda picture: picture.unlink(), {"pictures", "names", "contents"}),
        (lambda picture: shutil.copy(picture, picture.with_name("new.png")), {"pictures"}),
        (rename, {"names"}),
        (rewrite, {"contents"}),
        (lambda picture: os.utime(picture, (1, 1)), {"times"}),
        (lambda p: p.rename(p.parents[1] / "bee" / "moved.png"), {"names"}),
    ],
)
def test_every_change_shows(folder, change, keys):
    first = identify(folder, "folder")
    change(sorted((folder / "train" / "ant").iterdir())[2])
    second = identify(folder, "folder")
    changed = {name for name in first if first[name] != second[name]}
    assert keys <= changed
    assert len(keys) > 1 or "times" not in keys or changed == {"times"}


def test_groups_count(folder):
    one = identify(folder, "folder", num_references=2)
    assert one["groups"] != identify(folder, "folder", num_references=4)["groups"]


@pytest.mark.parametrize("count", [1, 5, identity.SAMPLE, 3 * identity.SAMPLE])
def test_all_of_few_and_a_sample_of_many_are_read(count):
    read = []
    stamps = (identity.Stamp(str(i), 1, 1) for i in range(count))
    identity.fingerprint(stamps, count, lambda i: read.append(i) or b"", threads=1)
    assert len(read) == len(set(read)) == min(count, identity.SAMPLE)
    assert {0, count - 1} <= set(read)


def test_what_is_gone_or_unreadable_is_no_traceback(folder):
    config = DataConfig(source="folder", path=str(folder))
    source = load_source(config, "train")
    first = identity.identify(source, num_threads=2)
    pathlib.Path(source.path(0)).unlink()
    assert identity.identify(source, num_threads=2) != first


def test_arrays_are_told_apart_by_content():
    first, second = (
        identity.identify(load_source(DataConfig(source="synthetic", image_size=8), split), 2)
        for split in ("train", "test")
    )
    assert first["contents"] != second["contents"]
