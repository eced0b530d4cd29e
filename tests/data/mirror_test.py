"""Data in a bucket equal the same in a folder, and are copied once."""

import dataclasses
import pathlib
import shutil

import numpy as np
import pytest

from dar_jax.common import addresses, storage
from dar_jax.common.files import write_json
from dar_jax.data import identity, mirror, pipeline, survey
from dar_jax.data.decode import UnreadablePictureError
from dar_jax.data.sources import DataConfig, load_source
from tests.data import tiny_sets

NUM_BATCHES = 9
"""More than an epoch."""


@pytest.fixture(autouse=True)
def fresh():
    """As in a new process."""
    mirror._copy.cache_clear()


@pytest.fixture
def copied(monkeypatch):
    """Addresses that were copied, in order."""
    addresses, download = [], storage.download_object

    def noting(address, size, target):
        addresses.append(address)
        download(address, size, target)

    monkeypatch.setattr(storage, "download_object", noting)
    return addresses


def configs(form, tmp_path, bucket):
    """A set in a folder, and the same in a bucket."""
    root = tmp_path / "set"
    kind = tiny_sets.FORMS[form](root)
    storage.upload_tree(root, bucket)
    cache = str(tmp_path / "cache")
    common = {**kind, "image_size": 12, "crop": "random", "batch_size": 4, "num_threads": 2}
    return (DataConfig(**common, path=str(path), cache_dir=cache) for path in (root, bucket))


def drawn(config):
    iterator = pipeline.train_iterator(config, seed=0)
    batches = [next(iterator) for _ in range(NUM_BATCHES)]
    iterator.close()
    return batches


@pytest.mark.parametrize("form", tiny_sets.FORMS)
def test_data_in_a_bucket_are_those_in_a_folder_and_are_copied_once(
    form, tmp_path, in_bucket, copied
):
    folder, bucket = configs(form, tmp_path, in_bucket)
    assert mirror.local(folder) is folder
    np.testing.assert_equal(drawn(bucket), drawn(folder))
    one, other = (identity.identify(load_source(c, "train"), 2) for c in (folder, bucket))
    assert one | {"times": ""} == other | {"times": ""}
    assert len(copied) == len(set(copied))
    everything = len(storage.files_below(in_bucket))
    held_out = len(load_source(bucket, "test")) if form.startswith("folder") else 0
    assert len(copied) == everything - held_out
    mirror._copy.cache_clear()
    again = identity.identify(load_source(bucket, "train"), 2)
    assert again == other and len(copied) == everything - held_out


def test_pictures_are_copied_when_they_are_read(tmp_path, in_bucket, copied):
    folder, bucket = configs("folder", tmp_path, in_bucket)
    before = identity.identify(load_source(bucket, "train"), 2)["times"]
    copied.clear()
    shutil.rmtree(tmp_path / "cache")
    mirror._copy.cache_clear()
    source = load_source(bucket, "train")
    assert copied == [] and len(source) == len(load_source(folder, "train"))
    assert source.read(3).data == load_source(folder, "train").read(3).data
    assert copied == [f"{in_bucket}/{source.paths[3]}"]
    assert pathlib.Path(source.path(3)).is_file() and not (source.root / source.paths[4]).exists()
    assert source.name(4) == str(source.root / source.paths[4])
    assert identity.identify(source, 2)["times"] == before
    survey.check_apart(bucket, str(tmp_path / "run"))
    survey.check_apart(bucket, f"{addresses.scheme_of(in_bucket)}://other/run")
    with pytest.raises(ValueError, match=f"workdir {in_bucket}/run lies in data.path"):
        survey.check_apart(bucket, f"{in_bucket}/run")


def test_copy_follows_the_bucket(tmp_path, in_bucket, copied):
    _, bucket = configs("tars", tmp_path, in_bucket)
    first = load_source(bucket, "train")
    path = in_bucket / "set-000001.tar"
    (pathlib.Path(first.members[0].path).parent / "left.tar").write_bytes(b"gone from the bucket")
    path.write_bytes((in_bucket / "set-000000.tar").read_bytes())
    (in_bucket / "set-000000.tar").unlink()
    mirror._copy.cache_clear()
    copied.clear()
    root = pathlib.Path(mirror.local(bucket).path)
    assert copied == [str(path)]
    assert [p.name for p in root.iterdir()] == ["set-000001.tar"]
    assert (root / "set-000001.tar").read_bytes() == path.read_bytes()


def test_class_that_is_gone_from_the_bucket_is_none_here(tmp_path, in_bucket):
    _, bucket = configs("folder", tmp_path, in_bucket)
    root = pathlib.Path(mirror.local(bucket).path)
    assert sorted(path.name for path in root.iterdir()) == ["ant", "bee", "cat"]
    storage.delete_tree(in_bucket / "cat")
    mirror._copy.cache_clear()
    mirror.local(bucket)
    assert sorted(path.name for path in root.iterdir()) == ["ant", "bee"]


def test_tars_by_braces_and_one_data_set_of_many(tmp_path, in_bucket, copied):
    _, bucket = configs("tars", tmp_path, in_bucket)
    braces = dataclasses.replace(bucket, path=f"{in_bucket}/set-{{000000..000001}}.tar")
    (in_bucket / "other.tar").write_bytes(b"no tar")
    assert len(load_source(braces, "train")) == tiny_sets.NUM_PICTURES - tiny_sets.NUM_HELD_OUT
    one = dataclasses.replace(bucket, path=f"{in_bucket}/set-000000.tar")
    assert len(load_source(one, "train")) < tiny_sets.NUM_PICTURES / 2
    several = dataclasses.replace(bucket, path=str(in_bucket), source="tfds:one/small:1.0.0")
    storage.upload(tmp_path / "set/set-000000.tar", in_bucket / "one/small/1.0.0/a")
    storage.upload(tmp_path / "set/set-000000.tar", in_bucket / "two/1.0.0/a")
    copied.clear()
    mirror.local(several)
    assert copied == [f"{in_bucket}/one/small/1.0.0/a"]


def test_copy_that_fails_leaves_nothing_half_and_is_one_line(tmp_path, in_bucket):
    _, bucket = configs("folder", tmp_path, in_bucket)
    source = load_source(bucket, "train")
    changed = f"{in_bucket}/{source.paths[0]}"
    storage.to_path(changed).write_bytes(b"short")
    with pytest.raises(ValueError, match=f"cannot copy {changed} to .*5 bytes, not .*changed"):
        source.read(0)
    assert not [*source.root.rglob(".*")] and not (source.root / source.paths[0]).exists()
    storage.to_path(f"{in_bucket}/{source.paths[1]}").unlink()
    with pytest.raises(UnreadablePictureError, match=source.paths[1]):
        source.read(1)


MISTAKES = {
    "bucket/nothing": "data.path: there is nothing at {address}",
    "nowhere/set": "cannot read data.path={address}: there is no such bucket; ",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_address_of_nothing_is_one_line(name, emulator, tmp_path):
    address = f"{emulator.scheme}://{name}"
    config = DataConfig(source="folder", path=address, cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=MISTAKES[name].format(address=address)) as caught:
        load_source(config, "train")
    assert "\n" not in str(caught.value)


def test_disk_that_is_too_small_is_one_line_before_anything_is_copied(
    tmp_path, in_bucket, copied, monkeypatch
):
    _, bucket = configs("tars", tmp_path, in_bucket)
    monkeypatch.setattr(mirror.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 6, 3))
    with pytest.raises(ValueError, match="has room for 3 bytes, but .*mount.* DIR"):
        load_source(bucket, "train")
    assert copied == []


def test_classes_of_a_file_in_a_bucket_are_those_of_a_local_one(tmp_path, in_bucket):
    folder, bucket = configs("folder", tmp_path, in_bucket / "set")
    write_json(tmp_path / "classes.json", {"cat": "feline", "ant": "insect"})
    storage.upload(tmp_path / "classes.json", in_bucket / "classes.json")
    one, other = (
        load_source(dataclasses.replace(config, classes=f"{where}/classes.json"), "train")
        for config, where in ((folder, tmp_path), (bucket, in_bucket))
    )
    assert one.class_names == other.class_names == ("feline", "insect")
    with pytest.raises(ValueError, match="cannot read data.classes='.*://.*/none.json' as JSON"):
        load_source(dataclasses.replace(bucket, classes=f"{in_bucket}/none.json"), "train")
