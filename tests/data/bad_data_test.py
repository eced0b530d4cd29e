"""Data that cannot be used as they are: one line that says what to do, or a skipped picture."""

import dataclasses
import itertools
import json
import logging

import numpy as np
import pytest
from absl import logging as absl_logging

from dar_jax.data import pipeline
from dar_jax.data.sources import DataConfig, check_num_classes, load_source
from tests.data import tiny_sets
from tests.data.tiny_sets import CLASSES, NUM_HELD_OUT, NUM_PICTURES, to_png, write_tar

PICTURE = to_png(np.zeros((8, 8, 3), np.uint8))


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def refusal(source, root, split="train", **options):
    with pytest.raises(ValueError, match=".") as caught:
        load_source(DataConfig(source=source, path=str(root), **options), split)
    (line,) = str(caught.value).splitlines()
    return line


FOLDERS = {
    "empty": ({}, "has no pictures"),
    "no pictures": ({"cat/notes.txt": b"", "cat/.hidden.jpg": b""}, "has no pictures"),
    "too high": (
        {"images/cat/a.jpg": PICTURE, "images/dog/a.jpg": PICTURE},
        "single class folder, 'images'",
    ),
    "other held-out classes": (
        {"train/cat/a.png": PICTURE, "val/cat/b.png": PICTURE, "val/dog/c.png": PICTURE},
        "classes that the training part has not: 'dog'",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_that_cannot_be_used(name, tmp_path):
    files, reason = FOLDERS[name]
    write(tmp_path, files)
    split = "test" if "held-out" in name else "train"
    assert reason in refusal("folder", tmp_path, split)


@pytest.mark.parametrize("source", ["folder", "records", "tar"])
@pytest.mark.parametrize("path", ["", "missing"])
def test_missing_directory_names_the_option(source, path, tmp_path):
    line = refusal(source, tmp_path / path if path else "")
    assert "is not a directory" in line and "--config.data.path=DIR" in line


def test_pictures_of_one_class_are_used_with_a_warning(tmp_path, caplog):
    write(tmp_path, {f"faces/{i}.png": PICTURE for i in range(4)})
    absl_logging.get_absl_logger().propagate = True
    with caplog.at_level(logging.WARNING, logger="absl"):
        source = load_source(DataConfig(source="folder", path=str(tmp_path)), "train")
        flat = load_source(DataConfig(source="folder", path=str(tmp_path / "faces")), "train")
    assert source.class_names == flat.class_names == ("faces",)
    assert len(source) == len(flat) == 3
    assert "single class, 'faces'" in caplog.text and "no class folders" in caplog.text


def test_class_with_one_picture_is_not_held_out(tmp_path):
    write(tmp_path, {f"{name}/a.png": PICTURE for name in CLASSES})
    assert len(load_source(DataConfig(source="folder", path=str(tmp_path)), "train")) == 3
    assert "test split" in refusal("folder", tmp_path, "test")


def test_classes_come_from_a_json_file_in_its_order(tmp_path):
    tiny_sets.make_folder(tmp_path / "set")
    file = tmp_path / "classes.json"
    config = DataConfig(source="folder", path=str(tmp_path / "set"), classes=str(file))
    file.write_text(json.dumps({"cat": "house cat", "ant": "ant"}))
    source = load_source(config, "train")
    assert source.class_names == ("house cat", "ant")
    pairs = zip(source.paths, source.labels, strict=True)
    assert {path.split("/")[0]: label for path, label in pairs} == {"cat": 0, "ant": 1}
    file.write_text(json.dumps(["cat", "dog"]))
    assert "names 'dog'" in refusal("folder", config.path, classes=config.classes)
    for content in ("[", "3", "[]", '{"cat": 3}'):
        file.write_text(content)
        assert "data.classes=" in refusal("folder", config.path, classes=config.classes)


TARS = {
    "none": (lambda root: None, "has no .tar files"),
    "no pictures": (lambda root: write_tar(root / "a.tar", {"a.txt": b""}), "hold no pictures"),
    "no class": (lambda root: write_tar(root / "a.tar", {"a.jpg": PICTURE}), "a.jpg has no class"),
    "label": (
        lambda root: write_tar(root / "a.tar", {"a.jpg": PICTURE, "a.cls": b"\x07\0"}),
        "no number and no name of a class",
    ),
    "mixed": (
        lambda root: write_tar(root / "a.tar", {"a.jpg": PICTURE, "a.cls": b"0", "c/b.jpg": b""}),
        "others by folders",
    ),
}


@pytest.mark.parametrize("name", TARS)
def test_tars_that_cannot_be_used(name, tmp_path):
    make, reason = TARS[name]
    make(tmp_path)
    assert reason in refusal("tar", tmp_path)


def test_tar_that_was_cut_short_is_named(tmp_path):
    tiny_sets.make_tars(tmp_path, shards=1)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:5000])
    assert str(path) in refusal("tar", tmp_path)


def test_tars_with_a_held_out_name_are_held_out(tmp_path):
    write_tar(tmp_path / "set-train-00.tar", {"c/a.jpg": PICTURE, "d/b.jpg": PICTURE})
    write_tar(tmp_path / "set-val-00.tar", {"c/x.jpg": PICTURE})
    config = DataConfig(source="tar", path=str(tmp_path))
    assert len(load_source(config, "train")) == 2
    assert load_source(config, "test").read(0).name.endswith("c/x.jpg")


def test_tfds_that_cannot_be_used(tmp_path):
    assert "Dataset imagenot not found" in refusal("tfds:imagenot", tmp_path)
    line = refusal("tfds:imagenet2012", tmp_path)
    assert "not prepared in" in line and "download_and_prepare()" in line
    assert "no features 'image' and 'label'" in refusal("tfds:celeb_a", tmp_path)


def test_number_of_classes_must_be_the_datas():
    source = load_source(DataConfig(source="synthetic", image_size=4), "train")
    check_num_classes(10, source)
    check_num_classes(None, source)
    with pytest.raises(ValueError, match="num_classes=1000, but the data have 10 classes"):
        check_num_classes(1000, source)


def break_pictures(root, *names):
    for name in names:
        path = next(root.rglob(name))
        path.write_bytes(path.read_bytes()[:40])


def test_unreadable_pictures_are_replaced_named_and_counted(tmp_path, caplog):
    config = DataConfig(
        **tiny_sets.make_folder(tmp_path),
        path=str(tmp_path),
        image_size=12,
        batch_size=4,
        max_corrupt_fraction=0.1,
    )
    train = load_source(config, "train").paths
    break_pictures(tmp_path, train[0].split("/")[1], train[5].split("/")[1])
    absl_logging.get_absl_logger().propagate = True
    runs = []
    for _ in range(2):
        with caplog.at_level(logging.WARNING, logger="absl"):
            iterator = pipeline.train_iterator(config, seed=0)
            runs.append([tiny_sets.numbers(next(iterator)["pixels"]) for _ in range(12)])
            iterator.close()
    assert runs[0] == runs[1]
    num_train = NUM_PICTURES - NUM_HELD_OUT
    found = np.bincount(np.concatenate(runs[0]), minlength=NUM_PICTURES)
    assert found.sum() == 2 * num_train
    expected = {int(path[-6:-4]): 2 for path in train}
    for broken, substitute in ((0, 1), (5, 6)):
        expected[int(train[substitute][-6:-4])] += expected.pop(int(train[broken][-6:-4]))
    assert {n: count for n, count in enumerate(found) if count} == expected
    assert train[0] in caplog.text and train[5] in caplog.text
    named = [r for r in caplog.records if "Unreadable" in r.getMessage()]
    assert len(named) == 4  # each once per run

    strict = dataclasses.replace(config, max_corrupt_fraction=0.05)
    iterator = pipeline.train_iterator(strict, seed=0)
    with pytest.raises(ValueError, match="2 of 24 pictures cannot be read"):
        list(itertools.islice(iterator, 6))
    iterator.close()


def test_vanished_pictures_are_left_out_of_an_evaluation(tmp_path):
    config = DataConfig(
        **tiny_sets.make_folder(tmp_path), path=str(tmp_path), image_size=12, batch_size=4
    )
    train = load_source(config, "train").paths
    (tmp_path / train[3]).unlink()
    with pytest.raises(ValueError, match="No such file or directory"):
        list(pipeline.eval_batches(config, "train"))
    config = dataclasses.replace(config, max_corrupt_fraction=0.1)
    batches = pipeline.eval_batches(config, "train", batch_size=6)
    found = [n for batch in batches for n in tiny_sets.numbers(batch["pixels"])]
    assert found == [int(path[-6:-4]) for path in train if path != train[3]]
