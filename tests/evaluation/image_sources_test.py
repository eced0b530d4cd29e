"""Images to be judged: which, in which order, and what is refused."""

import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dar_jax.common import image as images
from dar_jax.data.base import DataConfig
from dar_jax.data.sources import ENCODED, load_source
from dar_jax.evaluation.image_sources import (
    FolderImages,
    SetImages,
    SplitImages,
    check_size,
    open_images,
    read_all,
)
from dar_jax.generation.editing import read_picture
from dar_jax.generation.image_set import ImageSet

SYNTHETIC = DataConfig(source="synthetic", image_size=8)
LEVELS = np.arange(256, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Five pictures in two folders, each of one grey."""
    for index, name in enumerate(("b/1.png", "a/2.PNG", "a/10.png", ".hidden.png", "c.bmp")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (6, 4), (index, index, index)).save(path)
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_folder_is_read_in_the_order_of_its_paths(folder):
    found = open_images(str(folder))
    assert len(found) == 4 and found.size == (4, 6)
    np.testing.assert_array_equal(read_all(found)[:, 0, 0, 0], [2, 1, 0, 4])
    np.testing.assert_array_equal(found.read(1, 3), read_all(found)[1:3])


def test_folder_of_several_sizes_is_refused(folder):
    Image.new("RGB", (6, 5)).save(folder / "b" / "3.png")
    with pytest.raises(ValueError, match=r"of 4 x 6 pixels \(10.png\) and of 5 x 6 \(3.png\)"):
        read_all(open_images(str(folder)))


def test_unreadable_picture_is_named(folder):
    (folder / "b" / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot read .*1.png: not a picture"):
        read_all(open_images(str(folder)))


def test_folders_follow_the_rule_of_data_sets(folder, tmp_path_factory):
    """What is hidden or no file does not count, links do, every folder once."""
    store = tmp_path_factory.mktemp("store")
    Image.new("RGB", (6, 4), (9, 9, 9)).save(store / "x.tga")
    (folder / "linked").symlink_to(store)
    (folder / "again").symlink_to(".")
    (folder / ".cache").mkdir()
    Image.new("RGB", (6, 4)).save(folder / ".cache" / "y.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.png")
    np.testing.assert_array_equal(
        read_all(open_images(str(folder)))[:, 0, 0, 0], [2, 1, 0, 4, 9]
    )  # in the order of a/, b/, c.bmp, linked/


def test_unreadable_pictures_of_a_split_have_stand_ins_with_their_labels(tmp_path):
    for index in range(4):
        (tmp_path / "val" / str(index)).mkdir(parents=True)
        Image.new("RGB", (8, 8), (index,) * 3).save(tmp_path / "val" / str(index) / "0.png")
        (tmp_path / "train" / str(index)).mkdir(parents=True)
        for number in range(30):
            Image.new("RGB", (8, 8)).save(tmp_path / "train" / str(index) / f"{number}.png")
    (tmp_path / "val" / "2" / "0.png").write_bytes(b"broken")
    data = DataConfig(source="folder", path=str(tmp_path), image_size=8)
    split = SplitImages(data, "test")
    pixels, labels = read_all(split)[:, 0, 0, 0], split.labels()
    assert len(split) == 4 and 2 not in labels
    np.testing.assert_array_equal(pixels, labels)
    (tmp_path / "val" / "1" / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match="2 of 124 pictures cannot be read"):
        read_all(SplitImages(data, "test"))


@pytest.mark.parametrize("name", ["none", "none.npz", "notes.txt"])
def test_other_things_are_no_images(folder, name):
    with pytest.raises(ValueError, match=f"{name} (is neither|is not a readable)"):
        open_images(str(folder / name))
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no pictures"):
        open_images(str(folder / "empty"))


def test_whole_split_keeps_its_order_and_a_part_is_random():
    source = load_source(SYNTHETIC, "test")
    whole = SplitImages(SYNTHETIC, "test")
    np.testing.assert_array_equal(whole.read(3, 5), [source[3]["pixels"], source[4]["pixels"]])
    np.testing.assert_array_equal(whole.labels()[:2], [source[i]["label"] for i in range(2)])
    part, larger = (SplitImages(SYNTHETIC, "test", count) for count in (20, 30))
    np.testing.assert_array_equal(read_all(larger)[:20], read_all(part))
    assert part.identity == larger.identity != whole.identity
    assert not np.array_equal(read_all(part), whole.read(0, 20))
    assert len(SplitImages(SYNTHETIC, "test", 5000)) == len(whole)


@pytest.mark.parametrize("source", ENCODED)
def test_codes_and_latents_are_no_images(source):
    data = DataConfig(source=source)
    with pytest.raises(ValueError, match=f"{source!r} has no pictures"):
        len(SplitImages(data, "test"))
    with pytest.raises(ValueError, match=f"{source!r} has no pictures"):
        read_picture("config.sample.prefix_image", "test:1", data)


def test_crops_written_as_png_are_the_crops(tmp_path):
    original = SplitImages(SYNTHETIC, "train", 7)
    image_set = ImageSet(tmp_path / "set", 7, (0,), "png")
    image_set.bind({})
    image_set.write(0, read_all(original), {})
    np.testing.assert_array_equal(read_all(open_images(str(tmp_path / "set"))), read_all(original))


def test_arrays_of_a_set_are_told_apart(tmp_path):
    image_set = ImageSet(tmp_path / "set", 2, (0,))
    image_set.bind({})
    pixels = np.random.default_rng(0).integers(0, 256, (2, 2, 4, 4, 3), dtype=np.uint8)
    image_set.write(0, pixels[0], {"after_1": pixels[1]})
    last, first = SetImages(image_set, {}), SetImages(image_set, {}, "after_1")
    assert last.identity != first.identity
    np.testing.assert_array_equal([read_all(last), read_all(first)], pixels)


def draw_set(directory):
    image_set = ImageSet(directory, 5, (0,), "png")
    image_set.bind({"seed": 0})
    pixels = [np.full((4, 4, 3), 9 * index, np.uint8) for index in range(5)]
    image_set.write(0, np.stack(pixels), {})
    return directory


SPOILED = {
    "missing": (lambda path: path.unlink(), "image 2 is missing"),
    "another": (
        lambda path: path.write_bytes(path.with_name("00000001.png").read_bytes()),
        "00000002.png is damaged",
    ),
}


@pytest.mark.parametrize("how", SPOILED)
def test_set_that_lacks_an_image_or_has_another_is_refused(tmp_path, how):
    spoil, message = SPOILED[how]
    where = draw_set(tmp_path / "set")
    assert len(open_images(str(where))) == 5
    spoil(where / "00000002.png")
    with pytest.raises(ValueError, match=f"{message}; run the command that drew the set again"):
        open_images(str(where))
    (where / "manifest.json").unlink()
    assert len(open_images(str(where))) == (4 if how == "missing" else 5)


def test_manifest_of_somebody_else_says_nothing_of_a_folder(tmp_path):
    for index in (1, 3):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{index:08d}.png")
    (tmp_path / "manifest.json").write_text("[]")
    assert len(open_images(str(tmp_path))) == 2


def test_sizes_must_agree(folder):
    with pytest.raises(ValueError, match="of 4 x 6 pixels cannot be compared with images of 8 x 8"):
        check_size(FolderImages(folder, (folder / "c.bmp",)), SplitImages(SYNTHETIC, "test"))


def test_rounding_to_eight_bits():
    """Real images: trunc(255 x) of x in [0, 1]; samples: trunc(127.5 x + 128), the nearest level.

    The reference takes real images back from [-1, 1] in float32 and loses a level at times.
    """
    unit = LEVELS.astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(np.trunc(np.float32(255) * unit), LEVELS)
    symmetric = images.to_float(LEVELS[:, None])
    np.testing.assert_array_equal(images.to_pixels(jnp.asarray(symmetric))[:, 0], LEVELS)
    lost = LEVELS - np.trunc(np.float32(255) * ((symmetric[:, 0] + 1) / 2))
    assert (lost.sum(), lost.max()) == (63, 1)


def rewrite(path):
    """Put another picture into a file of the same size, at the same time."""
    times, size = path.stat(), path.stat().st_size
    content = bytearray(path.read_bytes())
    content[-1] ^= 255
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == size


@pytest.mark.parametrize("change", [rewrite, lambda path: path.rename(path.with_name("z.bmp"))])
def test_folder_with_other_pictures_is_another_and_a_copy_is_the_same(folder, tmp_path, change):
    before = open_images(str(folder)).identity
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert open_images(str(copy)).identity == before
    change(folder / "c.bmp")
    assert open_images(str(folder)).identity != before


def test_npz_is_known_by_its_content(tmp_path):
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    identities = []
    for name, value in (("a", 0), ("b", 0), ("c", 1)):
        np.savez(tmp_path / f"{name}.npz", arr_0=pixels + np.uint8(value))
        os.utime(tmp_path / f"{name}.npz", (5, 5))
        identities.append(open_images(str(tmp_path / f"{name}.npz")).identity)
    assert identities[0] == identities[1] != identities[2]
