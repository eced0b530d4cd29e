"""`--mode=cache --config.cache.kind=codes`: a data set as the codes of a frozen tokenizer.

Training pictures are encoded in all crops that `config.data.crop` may draw: one for "center", ten
for "ten_crop" (the published recipe), and all of them mirrored as well with `config.data.flip`;
held-out pictures in the centre crop. Every process encodes its own shards, each batch split over
its devices.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import grain
import jax
import ml_collections
import numpy as np

from dar_jax.common import image as images
from dar_jax.common import model_dir
from dar_jax.common.config import build
from dar_jax.common.typing import Array, Int, Params, UInt8
from dar_jax.data import codes, shards
from dar_jax.data.base import DataConfig, Source
from dar_jax.data.decode import CorruptTally, UnreadablePictureError
from dar_jax.data.sources import SPLITS, load_source
from dar_jax.data.transforms import center_crop, ten_crop
from dar_jax.generation import Progress, pad
from dar_jax.models.dar.tokenizer import Tokenizer, TokenizerConfig
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional import FunctionalModel
from dar_jax.train import open_workdir
from dar_jax.training import sharding

CROPS_PER_DEVICE = 64
"""Encoded at a time; their distances to 16,384 codes take 1 GB."""
PREFETCHED_PICTURES = 64
NUM_CROPS = {"center": 1, "ten_crop": 10}
CROPS = {"center": lambda pixels, size: center_crop(pixels, size)[None], "ten_crop": ten_crop}


def write_codes(config: ml_collections.ConfigDict, workdir: str, pictures_per_shard: int) -> None:
    """Write the codes of every split to `workdir`; shards that are there already are kept.

    Raises:
        ValueError: the data or the tokenizer cannot be used, or the workdir holds another cache.
        OSError: the workdir cannot be written.
    """
    data = build(DataConfig, config.data.to_dict(), "config.data")
    if data.crop not in CROPS:
        raise ValueError(
            f"config.data.crop={data.crop!r} never repeats a crop, so its codes cannot be cached; "
            f"use {' or '.join(CROPS)}"
        )
    if data.padding:
        raise ValueError(
            f"config.data.padding={data.padding} moves a picture anew every time, so its codes "
            "cannot be cached; use 0"
        )
    encoder = Encoder(config.tokenizer, data.image_size)
    sources = {split: load_source(data, split) for split in SPLITS}
    contents = {
        "kind": codes.KIND,
        "tokenizer": model_dir.fingerprint(config.tokenizer),
        "num_tokens": encoder.config.num_tokens,
        "image_size": data.image_size,
        "crop": data.crop,
        "flip": data.flip,
        "class_names": sources["train"].class_names,
        "made_from": {name: getattr(data, name) for name in ("source", "path")},
        "pictures": {split: len(source) for split, source in sources.items()},
        "pictures_per_shard": pictures_per_shard,
    }
    tallies = {s: CorruptTally(len(sources[s]), data.max_corrupt_fraction) for s in SPLITS}

    def records(split: str, pictures: range) -> Iterator[bytes]:
        # What is held out is seen in one crop, as everywhere else.
        seen = data if split == "train" else dataclasses.replace(data, crop="center", flip=False)
        examples = _read(sources[split], pictures, seen, tally=tallies[split])
        progress = Progress(len(pictures))
        for group in encoder.encode(examples, len(pictures), num_crops(seen)):
            progress.add(len(group))
            yield from (codes.pack(crops, label) for crops, label in group)

    shards.write_splits(open_workdir(workdir), contents, records)


def crops_of(
    pixels: UInt8[np.ndarray, "_ _ 3"], config: DataConfig
) -> UInt8[np.ndarray, "crops _ _ 3"]:
    """All crops [crops, size, size, 3] that training may see of a picture.

    Returns:
        The centre crop, or the ten in the order of `transforms.ten_crop`; then, with
        `config.flip`, all of them mirrored.
    """
    crops = CROPS[config.crop](pixels, config.image_size)
    return np.concatenate([crops, *([crops[:, :, ::-1]] if config.flip else [])])


def num_crops(config: DataConfig) -> int:
    """Number of crops that `crops_of` gives."""
    return NUM_CROPS[config.crop] * (2 if config.flip else 1)


class Encoder:
    """A tokenizer's encoder on the devices of this process."""

    def __init__(self, directory: str, image_size: int):
        """Load the tokenizer.

        Raises:
            ValueError: it cannot be read, is no tokenizer, does not take images of this size, or
                its codes do not fit into 16 bits.
        """
        loaded = model_dir.load_config(directory, "dar_tokenizer")
        self.config = build(TokenizerConfig, loaded["model"], directory)
        if self.config.codebook_size > codes.MAX_CODEBOOK_SIZE:
            raise ValueError(
                f"{directory} has {self.config.codebook_size} codes, at most "
                f"{codes.MAX_CODEBOOK_SIZE} can be cached"
            )
        if self.config.image_size != image_size:
            raise ValueError(
                f"config.data.image_size={image_size}, but {directory} takes images of "
                f"{self.config.image_size} pixels; use that"
            )
        # Codes are drawn in float32 whatever trains on them: bfloat16 flips close calls.
        self._model = FunctionalModel(Tokenizer, self.config, Compute())
        self._mesh = sharding.make_mesh(sharding.MeshConfig(), jax.local_devices())
        like = self._model.abstract_params()
        where = jax.tree.map(lambda _: sharding.replicated(self._mesh), like)
        self._params = model_dir.load_params(directory, like, where)

    def encode(
        self,
        examples: Iterator[tuple[UInt8[np.ndarray, "crops _ _ 3"], int]],
        num_pictures: int,
        num_crops: int,
    ) -> Iterator[list[tuple[Int[np.ndarray, "crops N"], int]]]:
        """Yield the codes of all crops of every picture, and its label, in order, in groups.

        Args:
            examples: crops and labels.
            num_pictures: the most that they are.
            num_crops: of each.
        """
        num_devices = self._mesh.size
        group_size = max(1, min(CROPS_PER_DEVICE * num_devices // num_crops, num_pictures))
        num_rows = math.ceil(group_size * num_crops / num_devices) * num_devices
        pending = None
        while group := list(itertools.islice(examples, group_size)):
            rows = pad(np.concatenate([crops for crops, _ in group]), num_rows)
            rows = jax.device_put(rows, sharding.batch_sharding(self._mesh))
            indices = _encode(self._model, self._params, rows)
            # The devices are at one batch while the one before is fetched.
            if pending is not None:
                yield _by_picture(*pending)
            pending = (group, indices)
        if pending is not None:
            yield _by_picture(*pending)


def _by_picture(
    group: Sequence[tuple[np.ndarray, int]], indices: Int[Array, "rows N"]
) -> list[tuple[Int[np.ndarray, "crops N"], int]]:
    ends = np.cumsum([len(crops) for crops, _ in group])
    rows = np.split(np.asarray(indices), ends)[: len(group)]  # the rest is padding
    return [(codes_of, label) for codes_of, (_, label) in zip(rows, group, strict=True)]


def _read(
    source: Source, pictures: range, config: DataConfig, *, tally: CorruptTally
) -> Iterator[tuple[UInt8[np.ndarray, "crops _ _ 3"], int]]:
    """Yield the crops and the label of every readable picture in order, read by several threads."""

    def example(index: int) -> tuple[np.ndarray, int] | None:
        try:
            found = source[index]
        except UnreadablePictureError as error:
            tally.add(index, error)
            return None
        return crops_of(found["pixels"], config), int(found["label"])

    dataset = grain.MapDataset.range(pictures.start, pictures.stop).map(example)
    options = grain.ReadOptions(config.num_threads, PREFETCHED_PICTURES)
    iterator = iter(dataset.to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()


@functools.partial(jax.jit, static_argnames="model")
def _encode(model: FunctionalModel[Tokenizer], params: Params, pixels: Array) -> Int[Array, "B N"]:
    return model.bind(params).encode(images.to_float(pixels)).indices
