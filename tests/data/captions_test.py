"""Captions of folders, tars and TFDS: where they stand, several, none, and what is no caption."""

import io
import json

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dar_jax.data.captions import read_table
from dar_jax.data.sources import DataConfig, load_source
from tests.data.tiny_sets import to_png, write_tar

PICTURE = to_png(np.zeros((8, 8, 3), np.uint8))
NAMES = [f"{number}.png" for number in range(6)]


def write(root, **files):
    """Write pictures and, by the name of the file without dots, texts."""
    root.mkdir(exist_ok=True)
    for name in NAMES:
        (root / name).write_bytes(PICTURE)
    for name, content in files.items():
        content = content if isinstance(content, bytes) else content.encode()
        (root / name.replace("__", "/").replace("_", ".")).write_bytes(content)
    return root


def captions(path, source="folder", **options):
    """Captions of all pictures by their names, from both splits."""
    found = {}
    for split in ("train", "test"):
        config = DataConfig(source=source, path=str(path), **{"captions": True, **options})
        opened = load_source(config, split)
        for index in range(len(opened)):
            found[opened.name(index).rpartition("/")[2].rpartition(":")[2]] = opened.captions[index]
    return found


def refusal(path, source="folder", **options):
    with pytest.raises(ValueError, match=r"\w") as caught:
        captions(path, source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


BESIDE = {f"{number}_txt": f"picture {number}" for number in range(6)}


def test_text_files_beside_pictures_hold_a_caption_a_line(tmp_path):
    write(tmp_path, **{**BESIDE, "3_txt": "\ufeffein roter Äpfel 🍎\r\n\n  a red apple \n"})
    found = captions(tmp_path)
    assert found["0.png"] == ("picture 0",) and len(found) == 6
    assert found["3.png"] == ("ein roter Äpfel 🍎", "a red apple")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('"one"', ("one",)),
        ('["one", "two", ""]', ("one", "two")),
        ('{"caption": "one", "label": 3}', ("one",)),
        ('{"captions": ["one", "two"], "text": "x"}', ("one", "two")),
        ('{"prompt": "  one "}', ("one",)),
    ],
)
def test_json_beside_a_picture_is_a_text_or_holds_some(content, expected, tmp_path):
    files = {name: text for name, text in BESIDE.items() if name != "4_txt"}
    assert captions(write(tmp_path, **files, **{"4_json": content}))["4.png"] == expected


def test_table_has_a_row_per_caption(tmp_path):
    rows = [{"file_name": name, "text": f"of {name}"} for name in NAMES]
    rows.append({"file_name": "./2.png", "text": "another, with \u2028"})
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    found = captions(write(tmp_path / "a", captions_jsonl=lines + "\n\n", **BESIDE))
    assert found["2.png"] == ("of 2.png", "another, with") and found["5.png"] == ("of 5.png",)
    table = "path,caption\n" + "".join(f'{name},"of ""{name}"", it is"\n' for name in NAMES)
    assert captions(write(tmp_path / "b", captions_csv=table))["1.png"] == ('of "1.png", it is',)


def test_classes_and_splits_stay_what_they_are(tmp_path):
    for part, number in (("train", 4), ("val", 2)):
        for name in ("ant", "bee"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(number):
                (tmp_path / part / name / f"{i}.png").write_bytes(PICTURE)
                (tmp_path / part / name / f"{i}.txt").write_text(f"{part} {name} {i}")
    config = DataConfig(source="folder", path=str(tmp_path), captions=True)
    train, test = load_source(config, "train"), load_source(config, "test")
    assert (len(train), len(test), train.class_names) == (8, 4, ("ant", "bee"))
    for source in (train, test):
        for index in range(len(source)):
            part, name = source.path(index).parts[-3:-1]
            assert source.captions[index] == (f"{part} {name} {source.path(index).stem}",)
            assert source.class_names[source.labels[index]] == name
    assert not load_source(DataConfig(source="folder", path=str(tmp_path)), "train").captions


def test_pictures_without_a_caption_are_left_out_counted_and_named(tmp_path, caplog):
    files = {name: text for name, text in BESIDE.items() if name != "1_txt"}
    write(tmp_path, **{**files, "2_txt": " \n", "3_json": "{}"} | {"3_txt": ""})
    with caplog.at_level("WARNING"):
        found = captions(tmp_path, test_fraction=0.01)
    assert set(found) == {"0.png", "4.png", "5.png"}
    assert "Left out 3 of" in caplog.text or "Left out 2 of" in caplog.text
    assert "whose captions are missing or empty: " in caplog.text and "1.png" in caplog.text


def test_no_captions_at_all_is_one_line(tmp_path):
    assert "has a caption; expected NAME.txt or NAME.json" in refusal(write(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("2_txt", b"\x89PNG\r\n\x1a\n\xff\xfe", "2.txt is no text in UTF-8 from byte 0 on"),
        ("2_txt", b"a\0b", "2.txt is no text: it has a zero byte"),
        ("2_txt", b"a" * (2**20 + 1), "2.txt"),
        ("2_json", b"{", "cannot read captions: "),
        ("2_json", b"[" * 100_000, "cannot read captions: "),
        ("2_json", b"{}", "has none of captions, caption, text, prompt"),
        ("2_json", b'{"caption": 3}', "has 3 where a caption should be"),
        ("captions_jsonl", b"{]\n", "captions.jsonl: line 1 is not JSON"),
        ("captions_jsonl", b"[1]\n", "line 1 is no object"),
        ("captions_jsonl", b'{"text": "x"}\n', "line 1 has none of file_name, file, path, image"),
        ("captions_csv", b"file_name,title\na.png,x\n", "line 2 has none of captions"),
        ("captions_csv", b"\xff\xfe\x00", "captions.csv is no text"),
        (
            "captions_csv",
            b"file_name,text\n1.png,a cat, on a chair\n",
            "line 2 has more fields than the first line",
        ),
    ],
)
def test_what_is_no_caption_is_one_line(name, content, reason, tmp_path):
    files = {key: text for key, text in BESIDE.items() if key[0] != name[0]}
    assert reason in refusal(write(tmp_path, **files, **{name: content}))


def test_empty_fields_at_the_end_of_a_row_are_nothing(tmp_path):
    table = tmp_path / "captions.csv"
    table.write_text("file_name,text\n0.png,a cat,,\n")
    assert read_table(table) == {"0.png": ("a cat",)}


def test_markup_and_commands_are_text(tmp_path):
    content = "<script>alert(1)</script> $(rm -rf /); `ls` %s {x}"
    assert captions(write(tmp_path, **{**BESIDE, "0_txt": content}))["0.png"] == (content,)


def test_tars_have_captions_in_text_or_json(tmp_path):
    members = {}
    for number, name in enumerate(NAMES):
        members[f"part/{name}"] = PICTURE
        text = f"caption {number}"
        if number % 2:
            members[f"part/{number}.txt"] = text.encode()
        else:
            members[f"part/{number}.json"] = json.dumps({"caption": text, "url": "x"}).encode()
    members["part/0.cls"] = b"7"
    write_tar(tmp_path / "a.tar", members)
    others = {"x.png": PICTURE, "x.json": b'{"caption": null}', "y.png": PICTURE, "y.txt": b"why"}
    write_tar(tmp_path / "b.tar", others)
    found = captions(tmp_path, "tar")
    assert {name.rpartition("/")[2]: texts for name, texts in found.items()} == {
        **{name: (f"caption {number}",) for number, name in enumerate(NAMES)},
        "y.png": ("why",),
    }
    config = DataConfig(source="tar", path=str(tmp_path), captions=True)
    assert load_source(config, "train").class_names == ("captioned",)


def test_binary_junk_in_a_tar_is_one_line(tmp_path):
    members = {"a.png": PICTURE, "a.txt": b"\xff\xfe", "b.png": PICTURE, "b.txt": b"fine"}
    write_tar(tmp_path / "a.tar", members)
    assert "a.tar: a.txt is no text in UTF-8" in refusal(tmp_path, "tar")


def test_sources_without_captions_are_refused():
    message = "captions=True needs data.source=folder, tar, tfds:NAME or"
    with pytest.raises(ValueError, match=message):
        load_source(DataConfig(source="mnist", captions=True), "train")


class TinyCoco(tfds.core.GeneratorBasedBuilder):
    """Captions as `coco_captions` has them, and no labels."""

    VERSION = tfds.core.Version("1.0.0")
    COLUMN, OF = "captions", tfds.features.Sequence({"text": np.str_, "id": np.int64})
    TEXTS = (["ein Äpfel", " a red apple "], [""], [], *([f"number {n}"] for n in range(3, 6)))

    def _info(self):
        boxes = tfds.features.Sequence({"bbox": tfds.features.BBoxFeature()})
        columns = {"image": tfds.features.Image(shape=(None, None, 3)), "objects": boxes}
        features = tfds.features.FeaturesDict({**columns, self.COLUMN: self.OF})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, manager):
        return {"train": self._generate_examples(), "val": self._generate_examples()}

    def value(self, texts):
        return [{"text": text, "id": number} for number, text in enumerate(texts)]

    def _generate_examples(self):
        for number, texts in enumerate(self.TEXTS):
            columns = {self.COLUMN: self.value(texts), "objects": []}
            yield number, {"image": io.BytesIO(PICTURE), **columns}


class TinyLaion(TinyCoco):
    """A caption as a text."""

    COLUMN, OF = "caption", tfds.features.Text()

    def value(self, texts):
        return "".join(texts)


class TinySilence(TinyLaion):
    """No column with texts."""

    COLUMN = "title"


@pytest.mark.parametrize(
    ("builder", "first"),
    [(TinyCoco, ("ein Äpfel", "a red apple")), (TinyLaion, ("ein Äpfel a red apple",))],
)
def test_column_of_tfds_has_captions(builder, first, tmp_path, caplog):
    builder(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    with caplog.at_level("WARNING"):
        found = captions(tmp_path, f"tfds:{builder.name}")
    texts = [first, *((f"number {n}",) for n in range(3, 6))]
    assert sorted(found.values()) == sorted(2 * texts)  # of both splits
    assert "Left out 2 of 6 pictures" in caplog.text
    config = DataConfig(source=f"tfds:{builder.name}", path=str(tmp_path), captions=True)
    source = load_source(config, "test")
    assert (len(source), source.class_names) == (4, ("captioned",))
    assert source[3]["pixels"].shape == (8, 8, 3) and source[3]["label"] == 0
    assert "no features 'image' and 'label'" in refusal(tmp_path, config.source, captions=False)


def test_tfds_without_a_column_of_texts_is_one_line(tmp_path):
    TinySilence(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    line = refusal(tmp_path, "tfds:tiny_silence")
    assert "record 0 has none of captions, caption, text, prompt; it has image" in line


def test_pictures_are_not_read_for_their_captions(tmp_path, monkeypatch):
    """Of a folder in a bucket each would be copied."""
    monkeypatch.setattr("dar_jax.data.mirror.fetch", None)
    assert captions(write(tmp_path / "a", **BESIDE))["3.png"] == ("picture 3",)
