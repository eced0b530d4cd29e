"""Tars: which members are pictures, what says their class, which are held out, what is refused."""

import gzip
import io
import itertools
import json
import os
import shutil
import tarfile

import pytest

from dar_jax.data import tar_index
from dar_jax.data.braces import expand
from tests.data.small_files import grey, greys, names, open_split, refusal, write, write_tar

PICTURE = grey(0)


def everything(root, **options):
    """Names of all pictures of both splits."""
    return sorted(
        itertools.chain(*(names(open_split("tar", root, s, **options)) for s in ("train", "test")))
    )


def pictures(*paths):
    return dict.fromkeys(paths, PICTURE)


def records(count=4, suffix=".cls", content=b"%d"):
    return {
        name: data
        for i in range(count)
        for name, data in ((f"{i:03d}.png", grey(i)), (f"{i:03d}{suffix}", content % (i % 2)))
    }


def test_mask_of_a_record_is_not_its_picture(tmp_path):
    masks = {f"{i:03d}.{word}.png": grey(250) for i in range(4) for word in ("seg", "2")}
    write_tar(tmp_path / "a.tar", {**masks, **records()})
    source = open_split("tar", tmp_path)
    assert greys(source) + greys(open_split("tar", tmp_path, "test")) != []
    assert max(greys(source)) < 4 and everything(tmp_path) == [f"{i:03d}.png" for i in range(4)]
    (left_out,) = source.seen.left_out
    assert (left_out.count, left_out.reason) == (8, "mask or further view of a record")


def test_picture_of_a_record_may_have_a_word_if_it_is_the_only_one(tmp_path):
    members = {"0.image.png": PICTURE, "0.cls": b"0", "1.image.png": PICTURE, "1.cls": b"0"}
    write_tar(tmp_path / "a.tar", members)
    assert everything(tmp_path) == ["0.image.png", "1.image.png"]


@pytest.mark.parametrize(
    ("members", "both"),
    [
        ({"0.jpg": PICTURE, "0.png": PICTURE, "0.cls": b"0"}, ("0.jpg", "0.png")),
        ({"0.left.png": PICTURE, "0.right.png": PICTURE, "0.json": b"{}"}, ("left", "right")),
        (pictures("cat/0.jpg", "cat/0.seg.png"), ("cat/0.jpg", "cat/0.seg.png")),
    ],
)
def test_two_that_could_be_the_picture_are_refused_with_both_names(members, both, tmp_path):
    write_tar(tmp_path / "a.tar", members)
    line = refusal(open_split, "tar", tmp_path)
    assert all(name in line for name in both)


def test_names_with_dots_are_pictures_of_their_own(tmp_path):
    paths = [f"{name}/{name}.{i}.jpg" for name in ("cat", "dog") for i in range(50)]
    write_tar(tmp_path / "kaggle/a.tar", pictures(*paths))
    assert everything(tmp_path / "kaggle") == sorted(paths)
    dates = [f"2021.01.{day:02d}" for day in range(1, 5)]
    members = {f"{d}.{s}": c for d in dates for s, c in (("png", PICTURE), ("cls", b"0"))}
    members |= {f"{date}.seg.png": PICTURE for date in dates}
    write_tar(tmp_path / "dates/a.tar", members)
    assert everything(tmp_path / "dates") == [f"{date}.png" for date in dates]


def test_two_suffixes_in_a_class_folder_are_two_pictures(tmp_path):
    paths = ["cat/0.jpg", "cat/0.png", "cat/1.png", "dog/1.png"]
    write_tar(tmp_path / "a.tar", pictures(*paths))
    assert everything(tmp_path) == paths


def test_links_in_a_tar_stand_for_what_they_lead_to(tmp_path):
    tree = tmp_path / "tree"
    write(tree, "cat/0.png", value=1)
    write(tree, "dog/0.png", value=2)
    os.link(tree / "cat/0.png", tree / "cat/1.png")
    os.link(tree / "cat/0.png", tree / "dog/1.png")
    (tree / "dog/2.png").symlink_to("../dog/0.png")
    (tree / "dog/3.png").symlink_to("2.png")
    (tree / "dog/4.png").symlink_to("/etc/hostname.png")
    (tree / "dog/5.png").symlink_to("5.png")
    os.mkfifo(tree / "dog/6.png")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tree, ".")
    found = [open_split("tar", tmp_path / "a.tar", split) for split in ("train", "test")]
    assert sorted(greys(found[0]) + greys(found[1])) == [1, 1, 1, 2, 2, 2]
    counts = {item.reason: item.count for item in found[0].seen.left_out}
    assert counts == {
        "link that leads to no file in the tar": 2,
        "neither a file nor a link to one": 1,
    }


@pytest.mark.parametrize("prefix", ["", "data/", "./set/images/"])
@pytest.mark.parametrize(("train", "held_out"), [("train", "val"), ("Training", "dev")])
def test_parts_in_tars_are_seen(prefix, train, held_out, tmp_path):
    paths = [f"{prefix}{p}/{c}/{p}{i}.png" for p in (train, held_out) for c in "ab" for i in (0, 1)]
    write_tar(tmp_path / "a.tar", pictures(*paths, f"{prefix}extra_{train}/README.txt"))
    source, test = (open_split("tar", tmp_path, split) for split in ("train", "test"))
    assert source.class_names == ("a", "b")
    assert {name.rpartition("/")[2][:-5] for name in names(source)} == {train}
    assert {name.rpartition("/")[2][:-5] for name in names(test)} == {held_out}


def test_parts_of_labelled_records_are_seen(tmp_path):
    for part, count in (("train", 4), ("val", 2)):
        members = {f"{part}/{name}": data for name, data in records(count).items()}
        write_tar(tmp_path / f"{part[0]}.tar", members)
    assert names(open_split("tar", tmp_path, "test")) == ["val/000.png", "val/001.png"]


def test_parts_by_the_names_of_tars_and_the_nearest_name_counts(tmp_path):
    for path in ("train-0.tar", "my-val/train-1.tar", "val-0.tar", "dev/0.tar", "x.tar"):
        stem = path.replace("/", "_")
        (tmp_path / path).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / path, pictures(f"cat/{stem}.png", f"dog/{stem}.png"))
    source = open_split("tar", tmp_path)
    shown = {name[4:] for name in names(source)}
    assert shown == {"my-val_train-1.tar.png", "train-0.tar.png", "x.tar.png"}
    assert {name[4:] for name in names(open_split("tar", tmp_path, "test"))} == {"val-0.tar.png"}
    assert [tuple(i)[:2] for i in source.seen.left_out] == [("in further held-out parts", 2)]


def test_held_out_pictures_do_not_depend_on_how_the_path_is_written(tmp_path, monkeypatch):
    for shard in range(3):
        members = {f"{c}/{shard}_{i}.png": PICTURE for c in ("cat", "dog") for i in range(20)}
        write_tar(tmp_path / f"set/shards/s-{shard:02d}.tar", members)
    shutil.copytree(tmp_path / "set", tmp_path / "moved")
    (tmp_path / "link").symlink_to("set")
    monkeypatch.chdir(tmp_path)
    ways = (
        *("set", "./set/", tmp_path / "set", "link", "moved", "set/../moved", "set/shards"),
        *("set/shards/s-{00..02}.tar", "{set,set}/shards/s-{02,01,00}.tar"),
    )
    found = {tuple(names(open_split("tar", path, "test", test_fraction=0.1))) for path in ways}
    assert len(found) == 1 and len(found.pop()) == 12


def test_outermost_folder_that_differs_is_the_class_as_in_folders(tmp_path):
    for path in ("cat/a/0.png", "cat/b/0.png", "dog/a/0.png", "dog/b/0.png"):
        write(tmp_path / "tree", path)
    write_tar(tmp_path / "a.tar", pictures(*(f"set/{p}" for p in ("cat/a/0.png", "dog/a/1.png"))))
    write_tar(tmp_path / "b.tar", pictures("set/cat/b/0.png", "set/dog/b/1.png"))
    assert open_split("tar", tmp_path).class_names == ("cat", "dog")
    assert open_split("folder", tmp_path / "tree").class_names == ("cat", "dog")


LABELS = {
    "numbers": (".cls", b" %d\n", ("0", "1")),
    "names": (".cls", b"class %d", ("class 0", "class 1")),
    "json number": (".json", b'{"width": 8, "label": %d}', ("0", "1")),
    "json name": (".json", b'{"class": "c%d", "caption": "x"}', ("c0", "c1")),
    "text": (".txt", b"c%d\n", ("c0", "c1")),
    "other case": (".CLS", b"%d", ("0", "1")),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_read_from_all_that_may_say_them(name, tmp_path):
    suffix, content, classes = LABELS[name]
    write_tar(tmp_path / "a.tar", records(20, suffix, content))
    source = open_split("tar", tmp_path)
    assert source.class_names == classes and len(source) == 18
    assert all(source.labels[i] == source[i]["pixels"][0, 0, 0] % 2 for i in range(18))


def test_captions_beside_pictures_in_class_folders_say_no_class(tmp_path):
    beside = {".png": PICTURE, ".txt": b"a long caption" * 50, ".json": b"{}"}
    stems = [f"{name}/{i}" for name in ("cat", "dog") for i in range(2)]
    write_tar(tmp_path / "a.tar", {stem + s: data for stem in stems for s, data in beside.items()})
    assert open_split("tar", tmp_path).class_names == ("cat", "dog")


def test_captions_are_no_classes(tmp_path):
    texts = {f"{i}.txt": b"cat %d" % i for i in range(4)}
    write_tar(tmp_path / "a.tar", {**texts, **pictures(*(f"{i}.png" for i in range(4)))})
    assert "4 different texts beside 4 pictures are captions" in refusal(
        open_split, "tar", tmp_path
    )


BAD_LABELS = {
    "huge": (b"10000000000", "holds 10000000000, no label in 0..999999"),
    "many digits": (b"9" * 6000, "no label in 0..999999"),
    "fraction": (b"3.0", "holds 3.0, no label in 0..999999, a whole number"),
    "negative": (b"-1", "holds -1, no label"),
    "empty": (b"", "holds '', no number"),
    "caption": (b"word " * 100, "no name of a class"),
    "binary": (b"\x00\x01", r"holds '\x00\x01', no number"),
}


@pytest.mark.parametrize("name", BAD_LABELS)
def test_bad_labels_are_refused(name, tmp_path):
    content, reason = BAD_LABELS[name]
    write_tar(tmp_path / "a.tar", {"a.png": PICTURE, "a.cls": content})
    line = refusal(open_split, "tar", tmp_path)
    assert reason in line and "a.cls" in line and len(line) < 500


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"label": [1]}', "has the label [1]"),
        (b'{"label": true}', "has the label True"),
        (b'{"label": 1.5}', "has the label 1.5"),
        (b"{", "is not a JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"label": 10000000000}', "no label in"),
        (b"{}", "has no class"),
        (b" " * (2**20 + 1), "too many for a label"),
    ],
)
def test_bad_json_labels_are_refused(content, reason, tmp_path):
    write_tar(tmp_path / "a.tar", {"a.png": PICTURE, "a.json": content})
    assert reason in refusal(open_split, "tar", tmp_path)


def test_numbers_and_names_of_classes_are_not_mixed(tmp_path):
    write_tar(
        tmp_path / "a.tar", {"a.png": PICTURE, "a.cls": b"1", "b.png": PICTURE, "b.cls": b"x"}
    )
    line = refusal(open_split, "tar", tmp_path)
    assert "numbers for labels, 1, and names, 'x'" in line


def test_what_lies_beside_tars_and_hidden_members_do_not_matter(tmp_path):
    members = {k: d for n, v in records(8).items() for k, d in ((f"./._{n}", b"\0mac"), (n, v))}
    members |= {"__MACOSX/000.png": PICTURE, ".thumbs/000.png": PICTURE, "000.npy": b"", "x": b""}
    write_tar(tmp_path / "a.tar", members)
    write(
        tmp_path, ".cache/download/a.tar.lock", "a.tar.md5", "a.tar.metadata", "._a.tar", "i.json"
    )
    os.mkfifo(tmp_path / "b.tar")
    source = open_split("tar", tmp_path)
    assert everything(tmp_path) == [f"{i:03d}.png" for i in range(8)]
    assert source.seen.files == len(members) + 5  # those in the tar and those beside it
    counts = {item.reason: item.count for item in source.seen.left_out}
    assert counts["hidden"] == 2 + len(records(8)) + 2
    assert counts["neither a file nor a link to one"] == counts["with the suffix .npy"] == 1


def test_linked_folders_and_tars_are_read_once(tmp_path):
    write_tar(tmp_path / "store/a.tar", records(8))
    (tmp_path / "set").mkdir()
    (tmp_path / "set/shards").symlink_to("../store")
    (tmp_path / "set/again.tar").symlink_to("../store/a.tar")
    os.link(tmp_path / "store/a.tar", tmp_path / "set/hard.tar")
    assert len(everything(tmp_path / "set")) == 8
    assert len(everything(tmp_path / "set/again.tar")) == 8


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_tars_are_read(mode, tmp_path):
    write_tar(tmp_path / f"a.tar.{mode[2:]}", records(8), mode)
    write_tar(tmp_path / "b.tar", {f"b{name}": data for name, data in records(8).items()}, mode)
    write_tar(tmp_path / "c.tar", {f"c{name}": data for name, data in records(8).items()})
    source = open_split("tar", tmp_path)
    assert len(everything(tmp_path)) == 24
    assert greys(source) == sorted(int(name[-7:-4]) for name in names(source))


def test_compressed_tars_that_are_too_large_or_damaged_are_refused(tmp_path, monkeypatch):
    write_tar(tmp_path / "cut/a.tar.gz", records(8), "w:gz")
    data = (tmp_path / "cut/a.tar.gz").read_bytes()
    (tmp_path / "cut/a.tar.gz").write_bytes(data[: len(data) // 2])
    said = refusal(open_split, "tar", tmp_path / "cut")
    assert "not a tar that pictures can be read from" in said
    monkeypatch.setattr(tar_index, "MAX_UNPACKED", 2**20)
    (tmp_path / "bomb").mkdir()
    (tmp_path / "bomb/a.tgz").write_bytes(gzip.compress(bytes(2**21)))
    assert "have more than 1,048,576 bytes" in refusal(open_split, "tar", tmp_path / "bomb")
    (tmp_path / "bomb/a.tgz").unlink()
    (tmp_path / "bomb/a.tar").write_bytes(b"\x28\xb5\x2f\xfd rest")
    assert "unpack it once: zstd -d" in refusal(open_split, "tar", tmp_path / "bomb")


def damage(data, how):
    """Tars that lost pictures: members take a block of 512 bytes for the name, and one for data."""
    match how:
        case "no end":
            return data[: 16 * 512]
        case "header":
            return data[: 8 * 512] + b"x" * 512 + data[9 * 512 :]
        case "inside a header":
            return data[: 8 * 512 + 100]
        case "inside a picture":
            return data[: 9 * 512 + 10]
        case "two in one":
            return data + data
        case "zeros":
            return data + bytes(20_000)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("header", "the header at byte 4,096 is damaged"),
        ("inside a header", "the header at byte 4,096 is damaged"),
        ("inside a picture", "unexpected end of data"),
        ("two in one", "two tars in one file"),
    ],
)
def test_tar_that_lost_pictures_is_refused(how, reason, tmp_path):
    write_tar(tmp_path / "a.tar", records(4))
    (tmp_path / "a.tar").write_bytes(damage((tmp_path / "a.tar").read_bytes(), how))
    assert reason in refusal(open_split, "tar", tmp_path)


@pytest.mark.parametrize(("how", "remarks"), [("no end", 1), ("zeros", 0)])
def test_tar_without_its_last_blocks_or_with_more_zeros_is_read(how, remarks, tmp_path):
    write_tar(tmp_path / "a.tar", records(4))
    (tmp_path / "a.tar").write_bytes(damage((tmp_path / "a.tar").read_bytes(), how))
    assert len(everything(tmp_path)) == 4
    assert len(open_split("tar", tmp_path).seen.remarks) == remarks


def test_two_members_of_one_name_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for _ in range(2):
            info = tarfile.TarInfo("cat/0.png")
            info.size = len(PICTURE)
            tar.addfile(info, io.BytesIO(PICTURE))
    assert "two files that are both called 'cat/0.png'" in refusal(open_split, "tar", tmp_path)


@pytest.mark.parametrize(
    ("tars", "reason"),
    [
        ({"train-val.tar": ("cat/0.png",)}, "says both 'train' and 'val'"),
        ({"val-0.tar": ("cat/0.png",)}, "are held out by their names"),
        ({"a.tar": ("train/cat/0.png", "more/cat/1.png")}, "folder 'more' beside 'train'"),
        ({"a.tar": ("train/0.png", "val/1.png")}, "0.png has no class"),
        ({"a.tar": ("train/a/0.png", "val/b/1.png")}, "the training part has not: 'b'"),
        ({"train.tar": ("a/0.png",), "val.tar": ("b/0.png",)}, "the training part has not: 'b'"),
    ],
)
def test_unclear_parts_are_refused(tars, reason, tmp_path):
    for name, paths in tars.items():
        write_tar(tmp_path / name, pictures(*paths))
    assert reason in refusal(open_split, "tar", tmp_path)


def test_single_picture_cannot_be_held_out(tmp_path):
    write_tar(tmp_path / "a.tar", pictures("cat/0.png"))
    assert "no class has two" in refusal(open_split, "tar", tmp_path, "test")


def test_braces_name_tars(tmp_path):
    for shard in range(3):
        write_tar(
            tmp_path / f"train-{shard:02d}.tar", pictures(f"c/{shard}.png", f"c/x{shard}.png")
        )
    write_tar(tmp_path / "val-00.tar", pictures("c/v.png"))
    path = f"{tmp_path}/{{train-{{00..01}},val-00}}.tar"
    assert names(open_split("tar", path)) == ["c/0.png", "c/1.png", "c/x0.png", "c/x1.png"]
    assert names(open_split("tar", path, "test")) == ["c/v.png"]
    line = refusal(open_split, "tar", f"{tmp_path}/train-{{00..05}}.tar")
    assert "names 6 tars, 3 of which are no files" in line and "train-03.tar" in line


def test_braces_expand_as_in_shells():
    assert expand("a") == ["a"]
    assert expand("s-{8..11}.tar") == ["s-8.tar", "s-9.tar", "s-10.tar", "s-11.tar"]
    assert expand("{a,b}-{00..01}") == ["a-00", "a-01", "b-00", "b-01"]
    assert expand("{x,y{1..2}}") == ["x", "y1", "x", "y2"]
    for pattern in ("{1..", "a}", "{}", "{5..3}", "{0..99999999999}", "{0..9999}{0..9999}"):
        assert pattern in refusal(expand, pattern)


def test_classes_that_are_not_listed_are_left_out_and_counted(tmp_path):
    write_tar(tmp_path / "a.tar", pictures(*(f"{c}/{i}.png" for c in "abc" for i in range(3))))
    file = tmp_path / "classes.json"
    file.write_text(json.dumps(["c", "a"]))
    source = open_split("tar", tmp_path, classes=str(file))
    assert source.class_names == ("c", "a") and len(source) == 4
    assert ("in other classes", 3) in [tuple(item)[:2] for item in source.seen.left_out]
