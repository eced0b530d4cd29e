"""Folders: which are the parts of a data set and which the classes, and what is left out."""

import logging
import os
import pathlib
import socket

import pytest
from absl import logging as absl_logging

from dar_jax.data.decode import MAX_FILE_BYTES, UnreadablePictureError
from dar_jax.data.listing import list_files
from tests.data.small_files import grey, greys, names, open_split, refusal, write

TWO = ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png")


@pytest.fixture
def warnings(caplog):
    absl_logging.get_absl_logger().propagate = True
    with caplog.at_level(logging.WARNING, logger="absl"):
        yield caplog


def parts(root):
    return [names(open_split("folder", root, split)) for split in ("train", "test")]


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        *(("train", "val"), ("Train", "Val"), ("TRAIN", "Test"), ("training", "testing")),
        *(("train", "validation"), ("training", "dev"), ("train", "valid"), ("train", "eval")),
    ],
)
def test_parts_are_known_by_their_names_in_any_case(train, held_out, tmp_path):
    write(tmp_path, *(f"{train}/{name}" for name in TWO), f"{held_out}/cat/7.png")
    assert parts(tmp_path) == [sorted(TWO), ["cat/7.png"]]
    assert open_split("folder", tmp_path).class_names == ("cat", "dog")


def test_first_held_out_name_counts_and_the_others_are_counted(tmp_path):
    write(tmp_path, *(f"train/{name}" for name in TWO), "test/cat/1.png", "val/cat/2.png")
    write(tmp_path, "extra/cat/3.png")
    assert parts(tmp_path)[1] == ["cat/2.png"]
    (left_out,) = open_split("folder", tmp_path).seen.left_out
    assert left_out.count == 2 and left_out.reason == "folder beside train"


def test_folders_beside_a_training_part_without_another_are_counted(tmp_path):
    write(tmp_path, *(f"train/{name}" for name in TWO), "extra/cat/1.png")
    assert [len(part) for part in parts(tmp_path)] == [2, 2]
    (left_out,) = open_split("folder", tmp_path, "test").seen.left_out
    assert left_out.example == "extra"


def test_flat_parts_are_one_class_of_the_data_sets_name(tmp_path, warnings):
    root = tmp_path / "faces"
    write(root, "train/0.png", "train/1.png", "val/2.png")
    assert parts(root) == [["0.png", "1.png"], ["2.png"]]
    assert open_split("folder", root, "test").class_names == ("faces",)
    assert "no class folders" in warnings.text


def test_class_name_does_not_depend_on_how_the_path_is_written(tmp_path, monkeypatch):
    write(tmp_path / "faces", "0.png", "1.png")
    monkeypatch.chdir(tmp_path / "faces")
    (tmp_path / "faces" / "x").mkdir()
    found = {open_split("folder", path).class_names for path in (".", "../faces", "x/..")}
    assert found == {("faces",)}


def test_part_that_may_be_a_class_is_one_with_a_warning(tmp_path, warnings):
    write(tmp_path, *(f"{name}/{i}.png" for name in ("car", "train", "val") for i in range(2)))
    assert open_split("folder", tmp_path).class_names == ("car", "train", "val")
    assert "'train', 'val' is taken for a class" in warnings.text


@pytest.mark.parametrize(
    ("paths", "reason"),
    [
        (("train/cat/0.png", "Train/cat/0.png"), "both 'Train' and 'train'"),
        (("train/cat/0.png", "val/cat/0.png", "VAL/cat/0.png"), "both 'VAL' and 'val'"),
        (("train/cat/0.png", "training/cat/0.png"), "both 'train' and 'training'"),
        ((*TWO, "val/cat/0.png"), "beside them, 'val'"),
    ],
)
def test_ambiguous_parts_are_refused_with_both_names(paths, reason, tmp_path):
    write(tmp_path, *paths)
    assert reason in refusal(open_split, "folder", tmp_path)


@pytest.mark.parametrize(
    ("paths", "reason"),
    [
        (("val/1.png",), "has pictures but no class folders"),
        (("val/notes.heic",), "has no pictures (left out: 1 with the suffix .heic)"),
        (("val/bird/1.png",), "classes that the training part has not: 'bird'"),
    ],
)
def test_held_out_part_that_does_not_fit_is_one_line(paths, reason, tmp_path):
    write(tmp_path, *(f"train/{name}" for name in TWO), *paths)
    assert reason in refusal(open_split, "folder", tmp_path, "test")


def test_held_out_classes_without_training_classes_are_refused(tmp_path):
    write(tmp_path, "train/0.png", "train/1.png", "val/cat/1.png")
    assert "has the class folders 'cat'" in refusal(open_split, "folder", tmp_path, "test")


def test_numbers_that_sort_as_text_are_warned_of(tmp_path, warnings):
    write(tmp_path / "a", *(f"{name}/{i}.png" for name in ("0", "9", "10") for i in range(2)))
    assert open_split("folder", tmp_path / "a").class_names == ("0", "10", "9")
    assert "label 1 is class '10'" in warnings.text
    warnings.clear()
    write(tmp_path / "c", *(f"{name}/{i}.png" for name in ("2.0", "10.0") for i in range(2)))
    open_split("folder", tmp_path / "c")
    assert "label 0 is class '10.0'" in warnings.text
    warnings.clear()
    write(tmp_path / "b", *(f"{name}/{i}.png" for name in ("00", "09", "10") for i in range(2)))
    open_split("folder", tmp_path / "b")
    assert "sorted as text" not in warnings.text


@pytest.mark.parametrize(
    "names", [("Cat", "cat"), ("caf\u00e9", "cafe\u0301"), ("cat", "cat ")], ids=ascii
)
def test_classes_that_look_the_same_are_warned_of(tmp_path, warnings, names):
    write(tmp_path, *(f"{name}/{i}.png" for name in names for i in range(2)))
    assert set(open_split("folder", tmp_path).class_names) == set(names)
    assert "are two classes; if they are one" in warnings.text


def test_every_suffix_that_can_be_read_is_and_others_are_counted(tmp_path):
    read = ("a.jpeg", "a.JFIF", "a.jpe", "a.tga", "a.avif", "a.jp2", "a.webp", "cat.0.jpg")
    others = ("a.heic", "b.heic", "a", "a.pfm", "a.eps", "a.pdf", ".hidden.png", "._a.png")
    write(tmp_path, *(f"cat/{name}" for name in (*read, *others)), "cat/.git/x.png", "loose.png")
    source = open_split("folder", tmp_path)
    assert len(source) + len(open_split("folder", tmp_path, "test")) == len(read)
    assert source.seen.files == len(read) + len(others) + 1
    counts = {item.reason: item.count for item in source.seen.left_out}
    assert counts == {
        "hidden": 3,
        "with the suffix .heic": 2,
        "without a suffix": 1,
        "with the suffix .pfm": 1,
        "with the suffix .eps": 1,
        "with the suffix .pdf": 1,
        "in no class folder": 1,
    }


def test_masks_beside_pictures_are_read_but_named(tmp_path):
    write(tmp_path, "cat/0.jpg", "cat/0.seg.png", "cat/1.jpg", "dog/2.0.jpg", "dog/2.1.jpg")
    (remark,) = open_split("folder", tmp_path).seen.remarks
    assert remark.startswith("1 files may be masks") and "cat/0.seg.png beside cat/0.jpg" in remark


def test_names_that_are_no_utf8_are_read_and_shown_in_one_line(tmp_path):
    write(tmp_path, *TWO, "cat/a\nb.png")
    latin = os.fsencode(tmp_path / "cat") + b"/caf\xe9.png"
    pathlib.Path(os.fsdecode(latin)).write_bytes(grey(9))
    pathlib.Path(os.fsdecode(os.fsencode(tmp_path) + b"/k\xf6ter")).mkdir()
    for name in (b"0.png", b"1.png"):
        path = os.fsencode(tmp_path) + b"/k\xf6ter/" + name
        pathlib.Path(os.fsdecode(path)).write_bytes(grey(9))
    sources = [open_split("folder", tmp_path, split) for split in ("train", "test")]
    assert sources[0].class_names == ("cat", "dog", r"k\xf6ter")
    shown = [source.name(i) for source in sources for i in range(len(source))]
    assert len(shown) == 8 and all(name.encode() and "\n" not in name for name in shown)
    assert any(name.endswith(r"caf\xe9.png") for name in shown)
    assert sorted(greys(sources[0]) + greys(sources[1])) == [0, 0, 0, 0, 0, 9, 9, 9]


def test_links_are_followed_once(tmp_path):
    root, store = tmp_path / "set", tmp_path / "store"
    write(root, *TWO)
    write(store, "bird/0.png", "bird/deep/1.png", "one.png")
    (root / "bird").symlink_to(store / "bird")
    (root / "cat" / "link.png").symlink_to(store / "one.png")
    os.link(root / "cat/0.png", root / "cat/hard.png")
    (root / "cat" / "self").symlink_to(".")
    (root / "cat" / "up").symlink_to("../..")
    (root / "dog" / "birds").symlink_to(store / "bird")
    (root / "zebra").symlink_to("cat")
    listing = list_files(root, (".png",))
    assert listing.paths == (
        *("bird/0.png", "bird/deep/1.png"),
        *("cat/0.png", "cat/1.png", "cat/hard.png", "cat/link.png"),
        # Up from the data set are the stored pictures that no link led to before.
        "cat/up/store/one.png",
        *("dog/0.png", "dog/1.png"),
    )
    (left_out,) = listing.seen.left_out
    assert left_out.reason == "link to a folder that is read already" and left_out.count == 5


def test_crossing_links_end(tmp_path):
    folders = [tmp_path / "set" / name for name in "abcdefghijkl"]
    outside = [tmp_path / "out" / name for name in "abcdefghijkl"]
    for here in (*folders, *outside):
        write(here, "0.png")
        for number, there in enumerate(outside):
            (here / f"link{number}").symlink_to(there)
    assert len(list_files(tmp_path / "set", (".png",)).paths) == len(folders) + len(outside)


def test_hidden_folder_is_read_where_a_link_leads_to_it(tmp_path):
    write(tmp_path, ".store/cat/0.png", ".store/cat/1.png", "dog/0.png", "dog/1.png")
    (tmp_path / "cat").symlink_to(".store/cat")
    assert [len(part) for part in parts(tmp_path)] == [2, 2]


def test_what_is_no_file_is_no_picture(tmp_path):
    write(tmp_path, *TWO)
    os.mkfifo(tmp_path / "cat/pipe.png")
    (tmp_path / "cat/zero.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        cwd = pathlib.Path.cwd()
        os.chdir(tmp_path / "cat")  # the path of a socket must be short
        server.bind("socket.png")
        os.chdir(cwd)
    source = open_split("folder", tmp_path)
    (left_out,) = source.seen.left_out
    assert left_out.count == 3 and left_out.reason == "neither a file nor a link to one"


def test_link_to_nothing_is_an_unreadable_picture(tmp_path):
    write(tmp_path, *TWO)
    (tmp_path / "cat/gone.png").symlink_to("nowhere.png")
    (tmp_path / "cat/circle.png").symlink_to("circle.png")
    assert list_files(tmp_path, (".png",)).paths[2:4] == ("cat/circle.png", "cat/gone.png")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("pipe", "no regular file"),
        ("/dev/zero", "no regular file"),
        ("[" * 100_000, "nested too deep"),
        ('["cat", "cat"]', "names a class twice"),
        ("[[1]]", "must hold a list of class names"),
    ],
)
def test_classes_that_are_no_list_are_refused(content, reason, tmp_path):
    write(tmp_path / "set", *TWO)
    file = tmp_path / "classes.json"
    if content == "pipe":
        os.mkfifo(file)
    elif content == "/dev/zero":
        file.symlink_to(content)
    else:
        file.write_text(content)
    assert reason in refusal(open_split, "folder", tmp_path / "set", classes=str(file))


def test_file_of_many_bytes_is_an_unreadable_picture(tmp_path):
    write(tmp_path, *TWO)
    for name in TWO:
        os.truncate(tmp_path / name, MAX_FILE_BYTES + 1)  # holes take no room
    source = open_split("folder", tmp_path)
    with pytest.raises(UnreadablePictureError, match="1,073,741,825 bytes, more than"):
        source.read(0)


def test_file_that_became_a_pipe_is_an_unreadable_picture(tmp_path):
    write(tmp_path, *TWO)
    source = open_split("folder", tmp_path)
    source.path(0).unlink()
    os.mkfifo(source.path(0))
    with pytest.raises(UnreadablePictureError, match="no regular file"):
        source.read(0)


def test_folder_that_must_not_be_read_is_left_out_and_named(tmp_path, monkeypatch, warnings):
    write(tmp_path, *TWO, "lost/0.png")
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("lost"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert len(list_files(tmp_path, (".png",)).paths) == len(TWO)
    assert "No permission to read the folder" in warnings.text
