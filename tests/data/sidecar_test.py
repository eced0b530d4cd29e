"""Sidecars of caches that were cut, edited or are of something else: one line, no traceback."""

import json
import os
import pathlib
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dar_jax.common import storage
from dar_jax.data import codes, encoded, latents, records, shard_writing, shards
from dar_jax.data.sources import DataConfig, load_source
from tests.damage import DAMAGES, damage, outcome, warnings
from tests.data import tiny_sets
from tests.data.small_files import open_split, refusal

ROOT = pathlib.Path(__file__).parents[2]
CONTENTS = {
    "class_names": ["a", "b"],
    "pictures": {"train": 4, "test": 2},
    "pictures_per_shard": 3,
    "made_from": {},
    "image_size": 8,
}
FORMS = {
    "codes": (codes.FORM, {"tokenizer": "0" * 64, "num_tokens": 4}, (4,)),
    "latents": (latents.FORM, {"vae": "0" * 64, "shape": [2, 2, 3]}, (2, 2, 3)),
}
KEYS = {
    "records": ("class_names", "counts", "image_size", "complete", "kind"),
    "codes": ("class_names", "counts", "tokenizer", "num_tokens", "complete", "kind"),
    "latents": ("class_names", "counts", "vae", "shape", "image_size", "complete", "kind"),
}
WRONG = {
    "nothing": None,
    "text": "x",
    "number": 3.5,
    "negative": -1,
    "truth": True,
    "list": [],
    "nested": [[1]],
    "object": {},
    "train alone": {"train": [1]},
    "counts of texts": {"train": ["1"], "test": [1]},
}
FITTING = {("complete", "truth"), ("tokenizer", "text"), ("vae", "text")}


@pytest.fixture(scope="module", params=KEYS)
def cache(request, tmp_path_factory):
    """A complete cache of each kind: its name, directory and sidecar."""
    root = tmp_path_factory.mktemp("cache") / "set"
    if request.param == "records":
        tiny_sets.make_records(root)
    else:
        form, more, shape = FORMS[request.param]
        root.mkdir()

        def make(split, pictures):
            for index in pictures:
                yield form.pack(np.full((2, *shape), index), index % 2)

        shard_writing.write_splits(root, {"kind": form.kind, **CONTENTS, **more}, make)
    return request.param, root, json.loads((root / shards.SIDECAR_NAME).read_text())


def refused(cache, sidecar):
    name, root, right = cache
    path = root / shards.SIDECAR_NAME
    path.write_text(sidecar if isinstance(sidecar, str) else json.dumps(sidecar))
    try:
        return refusal(open_split, name, root, image_size=8)
    finally:
        path.write_text(json.dumps(right))


def test_complete_cache_is_read(cache):
    name, root, _ = cache
    assert len(load_source(DataConfig(source=name, path=str(root), image_size=8), "test"))


def test_missing_key_is_named(cache):
    name, _, sidecar = cache
    for key in KEYS[name]:
        line = refused(cache, {k: v for k, v in sidecar.items() if k != key})
        if key not in ("complete", "kind"):
            assert f"lacks {key}, expected" in line


def test_wrong_value_is_named(cache):
    name, _, sidecar = cache
    for key in KEYS[name]:
        for kind, value in WRONG.items():
            if (key, kind) not in FITTING:
                line = refused(cache, {**sidecar, key: value})
                assert key in ("complete", "kind") or f"has {key}=" in line, (key, kind)


def test_long_value_is_shown_in_part(cache):
    _, _, sidecar = cache
    assert len(refused(cache, {**sidecar, "counts": ["x" * 10_000]})) < 400


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, "\0"])
def test_sidecar_that_is_no_object_is_refused(cache, text):
    refused(cache, text)


def test_sidecar_that_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / shards.SIDECAR_NAME)
    assert "no regular file" in refusal(open_split, "records", tmp_path)


def test_cache_without_its_mark_of_completion_is_not_taken_for_complete(cache):
    _, root, sidecar = cache
    path = root / shards.SIDECAR_NAME
    contents = {k: v for k, v in sidecar.items() if k not in ("complete", "counts")}
    path.write_text(json.dumps({**contents, "complete": "yes"}))
    assert not shard_writing.begin(root, contents)
    path.write_text(json.dumps(sidecar))


def write_records(directory, content):
    shards.write_shard(shards.shard_path(directory, "train", 0, 1), content)
    return shards.open_shards(directory, "train", [len(content)])


@pytest.mark.parametrize("name", FORMS)
def test_record_of_another_length_or_label_is_named(name, tmp_path):
    form, _, shape = FORMS[name]
    right = form.pack(np.zeros((2, *shape)), 1)
    wrong = (b"", right[:4], right[:-1], form.pack(np.zeros(shape), 2))
    opened = write_records(tmp_path, [right, *wrong])
    source = encoded.CachedSource(opened, form, shape, ("a", "b"))
    assert source[0][form.name].shape == (2, *shape)
    for index in range(1, 5):
        assert f"record {index} of the {name}" in refusal(source.__getitem__, index)


def test_record_without_a_label_is_an_unreadable_picture(tmp_path):
    source = records.RecordSource(write_records(tmp_path, [b"abc"]), "set train", ("a",))
    with pytest.raises(records.UnreadablePictureError, match="set train record 0: .* no label"):
        source[0]


def write_codes(root):
    """Write a cache of codes; return the shards that had to be written."""
    written = []

    def make(split, pictures):
        written.append((split, pictures.start))
        for index in pictures:
            yield codes.FORM.pack(np.full((2, 4), index), index % 2)

    contents = {"kind": codes.FORM.kind, **CONTENTS, **FORMS["codes"][1]}
    shard_writing.write_splits(root, contents, make)
    return written


def codes_of(root):
    data = DataConfig(source="codes", path=str(root))
    return [load_source(data, "train")[index]["codes"].tolist() for index in range(4)]


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_shard_is_written_again(tmp_path, caplog, how):
    assert write_codes(tmp_path) == [("train", 0), ("train", 3), ("test", 0)]
    assert write_codes(tmp_path) == []
    expected = codes_of(tmp_path)
    path = tmp_path / "train-00000-of-00002.array_record"
    assert damage(path, how)
    assert outcome(lambda: codes_of(tmp_path))[1], "the codes have changed in silence"
    with warnings(caplog) as told:
        assert write_codes(tmp_path) == [("train", 0)]
    assert how == "deleted" or (len(told) == 1 and path.name in told[0])
    assert codes_of(tmp_path) == expected
    assert write_codes(tmp_path) == []
    assert not list(tmp_path.glob("*.sha256"))


@pytest.mark.parametrize("how", ["emptied", "truncated", "flipped"])
def test_shard_that_is_damaged_before_the_end_is_written_again(tmp_path, monkeypatch, how):
    def stop(*_):
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(shard_writing, "finish", stop)
        with pytest.raises(OSError, match="killed"):
            write_codes(tmp_path)
    damage(tmp_path / "train-00001-of-00002.array_record", how)
    assert write_codes(tmp_path) == [("train", 3)]


@pytest.mark.parametrize("name", ["train-00001-of-00002", "test-00000-of-00001"])
def test_shard_in_the_place_of_another_is_refused(tmp_path, name):
    """It is whole, of as many records."""
    contents = {"kind": codes.FORM.kind, **CONTENTS, **FORMS["codes"][1]}
    contents["pictures"] = {"train": 6, "test": 3}

    def make(split, pictures):
        for index in pictures:
            yield codes.FORM.pack(np.full((2, 4), len(split) + index), index % 2)

    shard_writing.write_splits(tmp_path, contents, make)
    for split in ("train", "test"):
        assert len(open_split("codes", tmp_path, split)) in (3, 6)
    path = tmp_path / f"{name}.array_record"
    path.write_bytes((tmp_path / "train-00000-of-00002.array_record").read_bytes())
    split = name.partition("-")[0]
    line = refusal(open_split, "codes", tmp_path, split=split)
    assert f"{path} is not the shard that was written under this name" in line


def test_sidecar_that_was_edited_is_read_with_a_warning(cache, caplog):
    name, root, sidecar = cache
    path = root / shards.SIDECAR_NAME
    path.write_text(json.dumps({**sidecar, "class_names": ["x", *sidecar["class_names"][1:]]}))
    data = DataConfig(source=name, path=str(root), image_size=8)
    with warnings(caplog) as told:
        assert load_source(data, "test").class_names[0] == "x"
    path.write_text(json.dumps(sidecar))
    assert any("dataset.json has changed since it was written" in text for text in told)
    with warnings(caplog) as told:
        load_source(data, "test")
    assert not told


def test_cache_that_is_older_than_digests_gets_them(tmp_path):
    write_codes(tmp_path)
    path = tmp_path / shards.SIDECAR_NAME
    sidecar = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in sidecar.items() if k != "digests"}))
    assert write_codes(tmp_path) == []
    assert json.loads(path.read_text())["digests"] == sidecar["digests"]


WRITE_CODES = """
import sys, time
from dar_jax.common import storage
from tests.data import sidecar_test
sidecar_test.write_slowly(storage.to_path(sys.argv[1]))
"""
MANY = {**CONTENTS, "pictures": {"train": 24, "test": 6}, "pictures_per_shard": 2}


def write_slowly(root, seconds=0.1):
    """As `write_codes`, many shards, each of which takes a while."""
    written = []

    def make(split, pictures):
        written.append((split, pictures.start))
        for index in pictures:
            time.sleep(seconds)
            yield codes.FORM.pack(np.full((2, 4), index), index % 2)

    contents = {"kind": codes.FORM.kind, **MANY, **FORMS["codes"][1]}
    shard_writing.write_splits(root, contents, make)
    return written


def test_processes_share_a_cache_and_do_what_a_killed_one_had_begun(anywhere, tmp_path):
    directory = anywhere / "cache"
    storage.make_directory(directory)
    expected = tmp_path / "expected"
    expected.mkdir()
    write_slowly(expected, seconds=0)
    command = [sys.executable, "-c", WRITE_CODES, str(directory)]
    process = subprocess.Popen(command, cwd=ROOT)
    while not [path for path in storage.entries(directory) if path.suffix == ".array_record"]:
        assert process.poll() is None
        time.sleep(0.02)
    with ThreadPoolExecutor(1) as pool:
        own = pool.submit(write_slowly, directory)
        while len(storage.entries(directory)) < MANY["pictures"]["train"] / 2:
            time.sleep(0.02)
        process.kill()
        process.wait()
        written = own.result()
    assert 0 < len(written) < 15
    names = sorted(path.name for path in expected.iterdir())
    left = {path.name for path in storage.entries(directory)} - set(names)
    assert all(name.startswith(".train-") for name in left)  # what the killed one was writing
    for name in names:
        assert (directory / name).read_bytes() == (expected / name).read_bytes()
    assert write_slowly(directory) == []
