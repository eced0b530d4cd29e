"""Groups of pictures of one class: how they are made, read, refused, and what training sees."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from configs import mnist
from dar_jax.common import storage
from dar_jax.common.config_build import build
from dar_jax.config import build as read_config
from dar_jax.data import pipeline, references
from dar_jax.data.base import DataConfig
from dar_jax.data.sources import load_source
from dar_jax.modes import cache
from tests.damage import warnings
from tests.data import tiny_sets

SIZE = references.GROUP_SIZE
PIXELS = 8


@pytest.fixture
def data(tmp_path):
    """A folder of eight training pictures in each of three classes, and its config."""
    root = tmp_path / "set"
    return DataConfig(
        **tiny_sets.make_folder(root),
        path=str(root),
        image_size=PIXELS,
        batch_size=6,
        num_threads=2,
        test_fraction=0.1,
    )


def make_index(data, workdir, seed=0):
    config = mnist.get_config("kl_vae")
    config.seed = seed
    config.data = dataclasses.asdict(data)
    config.cache.kind = "references"
    cache.cache(read_config(config), str(workdir))
    return workdir / "references.jsonl"


def with_index(data, path, **changes):
    return dataclasses.replace(data, num_references=SIZE, references=str(path), **changes)


def write_lines(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_command_groups_every_picture_with_others_of_its_class(data, tmp_path):
    path = make_index(data, tmp_path / "a")
    source = load_source(data, "train")
    per_class = len(source) // len(tiny_sets.CLASSES)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == references.ROUNDS * len(source) // SIZE
    seen = [f"{line['cate']}/{name}" for line in lines for name in line["files"]]
    assert sorted(seen) == sorted(references.ROUNDS * source.paths)
    assert all(len(set(line["files"])) == SIZE for line in lines)
    assert len({tuple(line["files"]) for line in lines}) == len(lines)
    assert per_class % SIZE == 0  # else groups were filled up
    assert path.read_text() == make_index(data, tmp_path / "b").read_text()
    assert path.read_text() != make_index(data, tmp_path / "c", seed=1).read_text()


def test_groups_of_a_class_that_they_do_not_divide_are_filled_up():
    groups = references.make_groups([0] * 5 + [1] * 4, ("a", "b"), SIZE, seed=3)
    assert len(groups) == references.ROUNDS * 3
    counts = np.bincount(groups.ravel(), minlength=9)
    assert counts[:5].min() >= references.ROUNDS and set(counts[5:]) == {references.ROUNDS}
    assert all(len(set(row)) == SIZE and len(set(row // 5)) == 1 for row in groups)


def test_training_sees_the_files_of_a_line_in_their_order(data, tmp_path):
    """Published files have other lines than ours, and more files than are needed."""
    source = load_source(data, "train")
    names = {label: [] for label in range(3)}
    for path, label in zip(source.paths, source.labels, strict=True):
        names[label].append(path.partition("/")[2])
    lines = [{"cate": tiny_sets.CLASSES[n], "files": names[n][::-1][:6]} for n in (2, 0)]
    index = write_lines(tmp_path / "index.txt", *lines)
    batch = next(pipeline.train_iterator(with_index(data, index), seed=0))
    assert batch["pixels"].shape == (6, SIZE, PIXELS, PIXELS, 3)
    assert batch["label"].dtype == np.int32 and set(batch["label"].tolist()) == {0, 2}
    for pixels, label in zip(batch["pixels"], batch["label"], strict=True):
        expected = [int(name.partition(".")[0]) for name in names[label][::-1][:SIZE]]
        assert tiny_sets.numbers(pixels) == expected


def test_batches_of_groups_do_not_depend_on_processes_and_resume(data, tmp_path):
    config = with_index(data, make_index(data, tmp_path), crop="random", flip=True)
    whole = pipeline.train_iterator(config, seed=1)
    batches = [next(whole) for _ in range(5)]
    parts = [pipeline.train_iterator(config, seed=1, part=(i, 2)) for i in range(2)]
    for batch in batches[:2]:
        halves = [next(part)["pixels"] for part in parts]
        np.testing.assert_array_equal(np.concatenate(halves), batch["pixels"])
    resumed = pipeline.train_iterator(config, seed=1)
    resumed.set_state({"next_index": 4})
    np.testing.assert_array_equal(next(resumed)["pixels"], batches[4]["pixels"])
    for iterator in (whole, resumed, *parts):
        iterator.close()


def test_sources_without_folders_are_known_by_number(tmp_path):
    data = build(DataConfig, mnist.get_config("dar").data.to_dict(), "data")
    data = dataclasses.replace(data, batch_size=2, num_threads=2)
    path = make_index(data, tmp_path)
    source = load_source(data, "train")
    groups = references.read_index(path, source, SIZE)
    lines = [json.loads(line) for line in path.read_text().splitlines()[:50]]
    for line, indices in zip(lines, groups, strict=False):
        assert {line["cate"]} == {source.class_names[int(source.labels[i])] for i in indices}
    batches = [
        next(pipeline.train_iterator(config, seed=0))
        for config in (with_index(data, path), dataclasses.replace(data, num_references=SIZE))
    ]
    np.testing.assert_array_equal(batches[0]["pixels"], batches[1]["pixels"])  # the same seed


def test_index_in_a_bucket_is_that_of_a_folder(data, in_bucket, tmp_path):
    path, source = make_index(data, tmp_path), load_source(data, "train")
    storage.upload(path, in_bucket / "index.jsonl")
    groups = [
        references.read_index(str(where), source, SIZE)
        for where in (path, in_bucket / "index.jsonl")
    ]
    np.testing.assert_array_equal(*groups)
    with pytest.raises(ValueError, match="cannot read data.references='.*://"):
        references.read_index(f"{in_bucket}/none", source, SIZE)


BAD_INDICES = {
    "absent": ([{"cate": "ant", "files": ["x.png"] * 4}], r"line 1 names 'ant/x.png', which is"),
    "few": ([{"cate": "ant", "files": ["00.png"] * 3}], "line 1 names 3 files of 'ant', expected"),
    "other keys": ([{"class": "ant"}], r"line 1 must be \{\"cate\""),
    "empty": ([], "has no groups"),
}


@pytest.mark.parametrize("name", BAD_INDICES)
def test_bad_index_is_refused_with_one_line(data, tmp_path, name):
    lines, message = BAD_INDICES[name]
    index = write_lines(tmp_path / "index.txt", *lines)
    with pytest.raises(ValueError, match=message) as caught:
        pipeline.train_iterator(with_index(data, index), seed=0)
    assert "\n" not in str(caught.value)


def test_missing_or_broken_index_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="cannot read data.references='nowhere'"):
        pipeline.train_iterator(with_index(data, "nowhere"), seed=0)
    (tmp_path / "index.txt").write_text("ant 00.png\n")
    with pytest.raises(ValueError, match="line 1 is not a JSON"):
        pipeline.train_iterator(with_index(data, tmp_path / "index.txt"), seed=0)
    with pytest.raises(ValueError, match="references='x' needs num_references=4"):
        dataclasses.replace(data, references="x")


def test_group_of_several_classes_is_refused(data, tmp_path):
    source = load_source(data, "train")
    mixed = references.GroupSource(source, np.array([[0, 1, 2, len(source) - 1]]))
    with pytest.raises(ValueError, match="group 0 .* of several classes: ant, cat"):
        mixed[0]


def test_class_of_too_few_pictures_is_refused(data, tmp_path):
    for path in list((tmp_path / "set" / "bee").iterdir())[3:]:
        path.unlink()
    with pytest.raises(ValueError, match="class 'bee' has 2 pictures, but a group .* needs 4"):
        make_index(data, tmp_path / "index")
    assert not (tmp_path / "index" / "references.jsonl").exists()


def test_unreadable_picture_counts_once_whatever_groups_it_is_in(data, tmp_path, caplog):
    """One of 24 is 4 %, though it is in 4 of 24 groups."""
    root = tmp_path / "data"
    shutil.copytree(data.path, root)
    copy = dataclasses.replace(data, path=str(root), max_corrupt_fraction=0.05)
    source = load_source(copy, "train")
    (root / source.paths[0]).write_bytes(b"junk")
    config = dataclasses.replace(copy, num_references=SIZE)
    batches = pipeline.train_iterator(config, seed=0)
    with warnings(caplog) as told:
        for _ in range(references.ROUNDS * len(source) // (SIZE * config.batch_size) + 1):
            next(batches)
    batches.close()
    assert ["Unreadable picture, number 1" in text for text in told] == [True]
