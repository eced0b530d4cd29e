"""One tiny data set in every form that a source reads.

Picture i of class c is a rectangle of one colour (8 i, 60 c, 7), each of another odd size, so that
it is known again after cropping.
"""

import io
import itertools
import tarfile

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from dar_jax.data import records
from dar_jax.data.sources import DataConfig, load_source

CLASSES = ("ant", "bee", "cat")
PER_CLASS = 9
NUM_PICTURES = PER_CLASS * len(CLASSES)
NUM_HELD_OUT = len(CLASSES)  # of every class one, by the smallest fraction
STEP = 8


def pictures():
    """Yield (number, label, PNG bytes)."""
    for number in range(NUM_PICTURES):
        label = number % len(CLASSES)
        shape = (11 + number, 35 - number, 3)
        pixels = np.broadcast_to(np.uint8([STEP * number, 60 * label, 7]), shape)
        yield number, label, to_png(pixels)


def to_png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def numbers(pixels):
    """Tell which pictures the pixels [B, H, W, 3] show."""
    assert (pixels == pixels[:, :1, :1]).all()
    return (pixels[:, 0, 0, 0] // STEP).tolist()


def make_folder(root):
    for number, label, data in pictures():
        path = root / CLASSES[label] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return {"source": "folder"}


def make_split_folder(root):
    make_folder(root / "train")
    for name in CLASSES:
        path = next((root / "train" / name).iterdir())
        target = root / "val" / name / path.name
        target.parent.mkdir(parents=True)
        path.rename(target)
    return {"source": "folder"}


def make_tars(root, by_folder=False, shards=2):
    """Shard i holds every picture whose number is i modulo `shards`."""
    root.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        members = {}
        for number, label, data in itertools.islice(pictures(), shard, None, shards):
            if by_folder:
                members[f"{CLASSES[label]}/{number}.png"] = data
            else:
                members |= {f"{number}.png": data, f"{number}.cls": str(label).encode()}
        write_tar(root / f"set-{shard:06d}.tar", members)
    return {"source": "tar"}


def write_tar(path, members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def make_tars_of_folders(root):
    return make_tars(root, by_folder=True)


def make_records(root, **options):
    original = root.parent / f"{root.name}_folder"
    config = DataConfig(**make_folder(original), path=str(original))
    sources = {split: load_source(config, split) for split in ("train", "test")}
    root.mkdir()
    options = {"image_size": 0, "pictures_per_shard": 10, **options}
    records.write_images(config, root, sources=sources, **options)
    return {"source": "records"}


def make_tfds(root):
    builder = TinyPictures(data_dir=root, file_format="array_record")
    builder.download_and_prepare()
    return {"source": "tfds:tiny_pictures"}


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """The set as a TFDS builder without a held-out split."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=CLASSES),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number, label, data in pictures():
            yield number, {"image": io.BytesIO(data), "label": label}


EMOJI = ["1f613", "1f615", "1f616", "1f61e", "1f61f", "1f622", "1f623", "1f625", "1f626", "1f627"]
"""Code points of faces of one subgroup, which are in one part or the other; then of hands, each of
which has skin tones."""
EMOJI += [
    f"{hand}{tone}"
    for hand in ("1f44b", "1f590", "270b")
    for tone in ("", *(f"-1f3f{digit}" for digit in "bcdef"))
]


def make_emoji(path, names=EMOJI):
    """Write a file like that of the npm package, with a picture of every name."""
    members = {f"package/assets/{name}.webp": to_webp(i) for i, name in enumerate(names)}
    write_tar(path, {"package/README.md": b"", **members}, "w:gz")
    return path


def to_webp(number):
    """A picture whose left half tells its number and whose right half is transparent black."""
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:, :8] = [number, 0, 0, 255]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", lossless=True, exact=True)
    return file.getvalue()


FORMS = {
    "folder": make_folder,
    "folder with val": make_split_folder,
    "tars": make_tars,
    "tars of folders": make_tars_of_folders,
    "records": make_records,
    "tfds": make_tfds,
}
