"""Writing caches of pictures: whole, cut short, finished, refused."""

import json

import ml_collections
import numpy as np
import pytest

from dar_jax.config import build as read_config
from dar_jax.data import shards
from dar_jax.data.sources import DataConfig, load_source
from dar_jax.data.transforms import center_crop
from dar_jax.modes import cache
from tests.data import tiny_sets


@pytest.fixture
def config(tmp_path):
    data = tiny_sets.make_folder(tmp_path / "pictures")
    return ml_collections.ConfigDict(
        {
            "data": {**data, "path": str(tmp_path / "pictures")},
            "cache": {"kind": "images", "pictures_per_shard": 10},
        }
    )


def records(workdir, split="train", **options):
    return load_source(DataConfig(source="records", path=str(workdir), **options), split)


def test_cache_holds_the_files_as_they_are(config, tmp_path):
    cache.cache(read_config(config), str(tmp_path / "cache"))
    names = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert names == [
        "dataset.json",
        "test-00000-of-00001.array_record",
        *(f"train-0000{i}-of-00003.array_record" for i in range(3)),
    ]
    data = DataConfig(**config.data.to_dict())
    for split in ("train", "test"):
        original, cached = load_source(data, split), records(tmp_path / "cache", split)
        assert cached.class_names == original.class_names
        assert len(cached) == len(original)
        for index in range(len(original)):
            assert cached.read(index)[:2] == original.read(index)[:2]


def test_cache_of_crops_is_exact_and_refuses_larger_examples(config, tmp_path):
    config.cache.image_size = 9
    cache.cache(read_config(config), str(tmp_path / "cache"))
    original = load_source(DataConfig(**config.data.to_dict()), "train")
    cached = records(tmp_path / "cache", image_size=9)
    for index in range(len(original)):
        expected = center_crop(original[index]["pixels"], 9)
        np.testing.assert_array_equal(cached[index]["pixels"], expected)
    with pytest.raises(ValueError, match="of 9 pixels, too small for image_size=16"):
        records(tmp_path / "cache", image_size=16)


def test_cache_that_was_cut_short_is_refused_and_finished(config, tmp_path, monkeypatch):
    workdir = tmp_path / "cache"
    write, written = shards.write_shard, []

    def write_two(path, content):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        return write(path, content)

    monkeypatch.setattr(shards, "write_shard", write_two)
    with pytest.raises(KeyboardInterrupt):
        cache.cache(read_config(config), str(workdir))
    with pytest.raises(ValueError, match="was cut short .* run the command that wrote it again"):
        records(workdir)
    other = config.copy_and_resolve_references()
    other.cache.image_size = 9
    with pytest.raises(ValueError, match="holds a cache with other image_size"):
        cache.cache(read_config(other), str(workdir))

    before = {path: path.stat().st_mtime_ns for path in written}
    monkeypatch.setattr(shards, "write_shard", write)
    cache.cache(read_config(config), str(workdir))
    assert {path: path.stat().st_mtime_ns for path in written} == before
    assert len(records(workdir)) == tiny_sets.NUM_PICTURES - tiny_sets.NUM_HELD_OUT
    assert not list(workdir.glob(".*"))

    monkeypatch.setattr(shards, "write_shard", None)
    cache.cache(read_config(config), str(workdir))  # complete: nothing is written


def test_unreadable_pictures_are_left_out(config, tmp_path):
    original = load_source(DataConfig(**config.data.to_dict()), "train")
    original.root.joinpath(original.paths[4]).write_bytes(b"")
    with pytest.raises(ValueError, match="1 of 27 pictures cannot be read"):
        cache.cache(read_config(config), str(tmp_path / "strict"))
    config.data.max_corrupt_fraction = 0.1
    cache.cache(read_config(config), str(tmp_path / "cache"))
    assert len(records(tmp_path / "cache")) == len(original) - 1
    sidecar = json.loads((tmp_path / "cache" / "dataset.json").read_text())
    assert sidecar["counts"] == {"train": [9, 10, 4], "test": [3]}


@pytest.mark.parametrize("damage", ["delete", "cut"])
def test_shard_that_is_broken_is_named(config, tmp_path, damage):
    cache.cache(read_config(config), str(tmp_path / "cache"))
    shard = tmp_path / "cache" / "train-00001-of-00003.array_record"
    if damage == "delete":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"cannot read {shard}: .*write it again") as caught:
        records(tmp_path / "cache")
    assert len(str(caught.value).splitlines()) == 1


def test_directory_that_is_no_cache_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match="is not a complete cache .*--mode=cache"):
        records(tmp_path)
    (tmp_path / "dataset.json").write_text('{"kind": "codes", "complete": true}')
    with pytest.raises(ValueError, match="holds 'codes', expected 'images'"):
        records(tmp_path)


def test_workdir_that_cannot_be_written_is_one_line(config, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write_shard", fail)
    with pytest.raises(ValueError, match=r"cannot write the cache to .*: .*No space left"):
        cache.cache(read_config(config), str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("kind", "pixels", "unknown kind 'pixels'; available: images, codes, latents, references"),
        ("kind", "latents", "kind='latents' needs a config of TransDiff"),
        ("image_size", -1, "image_size -1 is negative"),
        ("pictures_per_shard", 0, "pictures_per_shard 0 is not positive"),
    ],
)
def test_config_that_makes_no_sense_is_refused(config, tmp_path, key, value, message):
    config.cache[key] = value
    with pytest.raises(ValueError, match=message):
        cache.cache(read_config(config), str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()
