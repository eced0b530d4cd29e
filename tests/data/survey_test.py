"""What is checked and told of the data before the first step."""

import logging

import numpy as np
import pytest
from absl import logging as absl_logging

from dar_jax.data import pipeline, survey
from dar_jax.data.decode import MAX_ASPECT, encode_png
from dar_jax.data.sources import DataConfig, load_source
from tests.data import tiny_sets
from tests.data.small_files import grey, refusal, write, write_tar

MAX_LINES = 12


def check(source, root, **options):
    config = DataConfig(source=source, path=str(root), **options)
    return survey.check(config, load_source(config, "train"))


def fill(root, count, *classes, start=0):
    write(root, *(f"{name}/{i}.png" for name in classes for i in range(start, start + count)))


def test_table_counts_files_pictures_and_what_is_left_out(tmp_path):
    fill(tmp_path / "train", 5, "cat", "dog")
    fill(tmp_path / "val", 2, "cat", "dog")
    write(tmp_path, "train/cat/a.heic", "train/dog/b.heic", "train/dog/c.txt", "val/cat/._d.png")
    assert check("folder", tmp_path).splitlines() == [
        f"folder {tmp_path}: 14 pictures of 2 classes, 18 files seen",
        "  to train on  10: cat 5, dog 5",
        "  held out     4: cat 2, dog 2; headers of all read, 0 unreadable",
        "  left out     2 with the suffix .heic, e.g. cat/a.heic"
        " (read after pip install 'dar-jax[images]')",
        "  left out     1 hidden, e.g. cat/._d.png",
        "  left out     1 with the suffix .txt, e.g. dog/c.txt",
    ]


def test_table_of_a_drawn_split_counts_each_file_once(tmp_path):
    fill(tmp_path, 10, *"abcdefgh")
    write(tmp_path, "a/notes.txt")
    lines = check("folder", tmp_path).splitlines()
    assert lines[0].endswith("80 pictures of 8 classes, 81 files seen")
    assert lines[1] == "  to train on  72: 9 (a) to 9 (a) of a class"
    assert lines[3] == "  left out     1 with the suffix .txt, e.g. a/notes.txt"


def test_table_is_short_however_much_is_left_out(tmp_path):
    fill(tmp_path / "train", 2, *(f"class{i}" for i in range(40)))
    fill(tmp_path / "val", 2, "class0")
    write(tmp_path / "train", *(f"class0/a.{i}x" for i in range(30)), "class0/0.seg.png")
    text = check("folder", tmp_path)
    assert len(text.splitlines()) <= MAX_LINES
    assert "no pictures  held out of 'class1', 'class10'" in text and "and 34 more" in text
    assert "left out     26 more: with the suffix" in text
    assert "note         1 files may be masks" in text


@pytest.mark.parametrize("form", tiny_sets.FORMS)
def test_every_form_is_described(form, tmp_path):
    root = tmp_path / "set"
    kind = tiny_sets.FORMS[form](root)
    lines = check(kind["source"], root).splitlines()
    assert f"{tiny_sets.NUM_PICTURES} pictures of 3 classes" in lines[0]
    assert "headers of all read, 0 unreadable" in lines[2]


def test_sources_without_files_are_described():
    config = DataConfig(source="mnist")
    text = survey.check(config, load_source(config, "train"))
    assert text.startswith("mnist: 5,000 pictures of 10 classes\n")


def test_single_picture_cannot_be_split(tmp_path):
    fill(tmp_path, 1, "cat")
    assert "no class has two, of which one could be held out" in refusal(check, "folder", tmp_path)


@pytest.mark.parametrize(
    ("count", "warning"), [(1, "Only 1 held-out picture:"), (3, "Only 3 "), (100, "")]
)
def test_few_held_out_pictures_are_warned_of(tmp_path, caplog, count, warning):
    fill(tmp_path / "train", 3, "cat")
    fill(tmp_path / "val", count, "cat")
    absl_logging.get_absl_logger().propagate = True
    with caplog.at_level(logging.WARNING, logger="absl"):
        check("folder", tmp_path)
    assert warning in caplog.text and bool(warning) == ("say little" in caplog.text)


def test_few_unreadable_held_out_pictures_are_tolerated_as_in_training(tmp_path):
    fill(tmp_path / "train", 96, "cat", "dog")
    fill(tmp_path / "val", 4, "cat", "dog")
    write(tmp_path / "val", "cat/1.png", **{"cat/1.png": b"broken"})
    assert "headers of all read, 1 unreadable" in check("folder", tmp_path)
    config = DataConfig(source="folder", path=str(tmp_path), image_size=8)
    assert sum(len(batch["label"]) for batch in pipeline.eval_batches(config, "test")) == 7
    write(tmp_path / "val", "cat/2.png", "dog/2.png", **{"cat/2.png": b"", "dog/2.png": b""})
    line = refusal(check, "folder", tmp_path)
    assert "3 of 8 held-out pictures cannot be read" in line and "of all 200 pictures" in line
    assert "3 of 200 pictures" in refusal(list, pipeline.eval_batches(config, "test"))


def test_held_out_part_without_a_readable_picture_is_refused(tmp_path):
    fill(tmp_path / "train", 400, "cat")
    write(tmp_path / "val", "cat/1.png", "cat/2.png", **{"cat/1.png": b"", "cat/2.png": b"x"})
    assert "2 of 2 held-out pictures cannot be read" in refusal(check, "folder", tmp_path)


def test_large_held_out_part_is_sampled_and_its_errors_are_projected(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "MAX_HEADERS", 20)
    fill(tmp_path / "train", 100, "cat")
    fill(tmp_path / "val", 100, "cat")
    assert "headers of the first 20 read, 0 unreadable" in check("folder", tmp_path)
    for index in range(0, 100, 5):
        write(tmp_path / "val", **{f"cat/{index}.png": b"broken"})
    assert "of 20 held-out pictures cannot be read" in refusal(check, "folder", tmp_path)


def test_headers_tell_pictures_that_scaling_would_make_enormous(tmp_path):
    thin = encode_png(np.zeros((1, MAX_ASPECT + 1, 3), np.uint8))
    write_tar(tmp_path / "train.tar", {f"c/{i}.png": grey(0) for i in range(3)})
    write_tar(tmp_path / "val.tar", {"c/thin.png": thin})
    assert f"{MAX_ASPECT + 1} x 1 pixels, one side more" in refusal(check, "tar", tmp_path)


@pytest.mark.parametrize("workdir", ["", "run", "cat", "cat/../new/run"])
def test_workdir_in_the_data_is_refused(tmp_path, workdir):
    fill(tmp_path, 2, "cat", "dog")
    config = DataConfig(source="folder", path=str(tmp_path))
    with pytest.raises(ValueError, match=r"lies in data.path=.* choose another"):
        survey.check_apart(config, str(tmp_path / workdir))


@pytest.mark.parametrize("workdir", [".runs/a", "../apart", "cat/.run"])
def test_workdir_where_no_data_are_looked_for_is_not(tmp_path, workdir):
    fill(tmp_path / "photos", 2, "cat", "dog")
    config = DataConfig(source="folder", path=str(tmp_path / "photos"))
    survey.check_apart(config, str(tmp_path / "photos" / workdir))


def test_workdir_beside_the_parts_of_the_data_is_not(tmp_path):
    fill(tmp_path / "train", 2, "cat", "dog")
    fill(tmp_path / "val", 2, "cat", "dog")
    config = DataConfig(source="folder", path=str(tmp_path))
    survey.check_apart(config, str(tmp_path / "run"))
    with pytest.raises(ValueError, match="lies in"):
        survey.check_apart(config, str(tmp_path / "val" / "run"))
