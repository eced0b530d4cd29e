"""Encoded pictures in ArrayRecord shards (see `shards`): reading, and writing any source as such.

A record is the label, 4 bytes, little-endian, and a picture file. A few large files serve where a
million small ones are slow to list and to read.
"""

import dataclasses
import struct
from collections.abc import Iterator, Mapping

import grain

from dar_jax.common import storage
from dar_jax.data import shard_writing, shards
from dar_jax.data.base import DataConfig, EncodedSource, Source, existing_directory
from dar_jax.data.decode import CorruptTally, UnreadablePictureError, decode, encode_png
from dar_jax.data.transforms import center_crop

KIND = "images"
LABEL = struct.Struct("<I")
PREFETCHED_PICTURES = 64


@dataclasses.dataclass(frozen=True, eq=False)
class RecordSource(EncodedSource):
    """Records of one split's shards."""

    records: grain.sources.RandomAccessDataSource[bytes]
    title: str
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.records)

    def name(self, index: int) -> str:
        return f"{self.title} record {index}"

    def fetch(self, index: int) -> tuple[bytes, int]:
        record = self.records[index]
        if len(record) < LABEL.size:
            raise OSError("the record has no label")
        (label,) = LABEL.unpack_from(record)
        return record[LABEL.size :], label


def load_records(config: DataConfig, split: str) -> RecordSource:
    """Open a split of the cache in `config.path`.

    Raises:
        ValueError: it is missing, incomplete or broken, or its pictures are too small.
    """
    directory = existing_directory(config)
    sidecar = shards.read_sidecar(directory, KIND, {"image_size": shards.NATURAL})
    if 0 < sidecar["image_size"] < config.image_size:
        raise ValueError(
            f"{directory} holds pictures of {sidecar['image_size']} pixels, too small for "
            f"image_size={config.image_size}; cache them again with a larger image_size, or 0"
        )
    records = shards.open_shards(
        directory, split, sidecar["counts"][split], sidecar.get(shards.ENDS, {})
    )
    return RecordSource(records, f"{directory} {split}", tuple(sidecar["class_names"]))


def write_images(
    config: DataConfig,
    directory: storage.Path,
    *,
    sources: Mapping[str, Source],
    image_size: int,
    pictures_per_shard: int,
) -> None:
    """Write the readable pictures of every split; shards that are there already are kept.

    Args:
        config: where the pictures are from, and how to read them.
        directory: to write to; it must exist.
        sources: by split.
        image_size: the pictures are cropped at the centre to this size and stored without loss;
            0 copies their files as they are.
        pictures_per_shard: the last shard of a split may have fewer.

    Raises:
        ValueError: the directory holds another cache, or too many pictures cannot be read.
        OSError: the directory cannot be written.
    """
    contents = {
        "kind": KIND,
        "image_size": image_size,
        "class_names": next(iter(sources.values())).class_names,
        "made_from": {name: getattr(config, name) for name in ("source", "path")},
        "pictures": {split: len(source) for split, source in sources.items()},
        "pictures_per_shard": pictures_per_shard,
    }
    total = sum(len(source) for source in sources.values())
    tallies = {split: CorruptTally(lambda: total, config.max_corrupt_fraction) for split in sources}

    def records(split: str, pictures: range) -> Iterator[bytes]:
        source, tally = sources[split], tallies[split]
        return _records(source, pictures, config, image_size=image_size, tally=tally)

    shard_writing.write_splits(directory, contents, records)


def _records(
    source: Source, pictures: range, config: DataConfig, *, image_size: int, tally: CorruptTally
) -> Iterator[bytes]:
    """Yield the records of the readable pictures in order, prepared by several threads."""

    def record(index: int) -> bytes | None:
        try:
            picture = source.read(index)
            pixels = decode(picture.data, picture.name)
        except UnreadablePictureError as error:
            tally.add(error)
            return None
        data = encode_png(center_crop(pixels, image_size)) if image_size else picture.data
        return LABEL.pack(picture.label) + data

    dataset = grain.MapDataset.range(pictures.start, pictures.stop).map(record)
    options = grain.ReadOptions(config.num_threads, max(config.num_threads, PREFETCHED_PICTURES))
    iterator = iter(dataset.to_iter_dataset(options))
    try:
        yield from filter(None, iterator)
    finally:
        iterator.close()
