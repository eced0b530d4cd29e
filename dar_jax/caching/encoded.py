"""Writing a data set as what a frozen model makes of its pictures, for `--mode=cache`.

Training pictures are encoded in all views that training may have of them. Every process encodes
shards that nobody else has, each batch split over its devices.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import grain
import jax
import numpy as np

from dar_jax.common import model_dir, storage
from dar_jax.common.batches import pad
from dar_jax.common.checks import check_finite
from dar_jax.common.progress import Progress
from dar_jax.common.typing import Any, Array, Params, UInt8
from dar_jax.data import shard_writing
from dar_jax.data.base import DataConfig, Source
from dar_jax.data.decode import CorruptTally, UnreadablePictureError
from dar_jax.data.encoded import Form
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.parallel import sharding

PREFETCHED_PICTURES = 64


@dataclasses.dataclass(frozen=True)
class Views:
    """`of` maps pixels [_, _, 3] of any size to `count` views of it, [count, size, size, 3]."""

    count: int
    of: Callable[[np.ndarray], np.ndarray]


class Labelled(NamedTuple):
    """What is known of a picture: its label and captions."""

    label: int
    captions: tuple[str, ...]


Encoded = list[tuple[np.ndarray, Labelled]]
"""What a model makes of some pictures."""


class FrozenEncoder:
    """A frozen model on the devices of this process."""

    def __init__(
        self,
        model: FunctionalModel,
        directory: str | pathlib.Path,
        run: Callable[[FunctionalModel, Params, Array], Array],
        *,
        rows_per_device: int,
    ):
        """Load the model's parameters.

        Args:
            model: the model.
            directory: its model directory.
            run: jitted; maps model, parameters and pixels [rows, H, W, 3] to an array [rows, ...].
            rows_per_device: encoded at a time: bounds memory.

        Raises:
            ValueError: the parameters cannot be read or do not fit.
        """
        self._model = model
        self._run = run
        self._rows_per_device = rows_per_device
        self._mesh = sharding.make_mesh(sharding.MeshConfig(), jax.local_devices())
        like = model.abstract_params()
        where = jax.tree.map(lambda _: sharding.replicated(self._mesh), like)
        self._params = model_dir.load_params(directory, like, where)

    def encode(
        self,
        examples: Iterator[tuple[UInt8[np.ndarray, "views _ _ 3"], Labelled]],
        num_pictures: int,
        num_views: int,
    ) -> Iterator[Encoded]:
        """Yield the array [views, ...] and the label of every picture, in order, in groups.

        Args:
            examples: views, and what else is known.
            num_pictures: the most that they are.
            num_views: of each.
        """
        num_devices = self._mesh.size
        group_size = max(1, min(self._rows_per_device * num_devices // num_views, num_pictures))
        num_rows = math.ceil(group_size * num_views / num_devices) * num_devices
        pending = None
        while group := list(itertools.islice(examples, group_size)):
            rows = pad(np.concatenate([views for views, _ in group]), num_rows)
            rows = jax.device_put(rows, sharding.batch_sharding(self._mesh))
            encoded = self._run(self._model, self._params, rows)
            # The devices are at one batch while the one before is fetched.
            if pending is not None:
                yield _by_picture(*pending)
            pending = (group, encoded)
        if pending is not None:
            yield _by_picture(*pending)


def write_encoded(
    data: DataConfig,
    directory: storage.Path,
    contents: Mapping[str, Any],
    *,
    form: Form,
    sources: Mapping[str, Source],
    encoder: FrozenEncoder,
    views: Mapping[str, Views],
    pictures_per_shard: int,
    pack: Callable[[Encoded], Iterable[bytes]] | None = None,
) -> None:
    """Write every split; shards that are there already are kept.

    Args:
        data: where the pictures are from, and how to read them.
        directory: to write to; it must exist.
        contents: what distinguishes this cache from others of its kind, as JSON types.
        form: of the records.
        sources: of the pictures, by split.
        encoder: of the views.
        views: by split.
        pictures_per_shard: the last shard of a split may have fewer.
        pack: makes records; None makes those of the form.

    Raises:
        ValueError: the directory holds another cache, too many pictures cannot be read, or what
            the model makes of one is not finite.
        OSError: the directory cannot be written.
    """
    contents = {
        "kind": form.kind,
        **contents,
        "image_size": data.image_size,
        "class_names": sources["train"].class_names,
        "made_from": {name: getattr(data, name) for name in ("source", "path")},
        "pictures": {split: len(source) for split, source in sources.items()},
        "pictures_per_shard": pictures_per_shard,
    }
    total = sum(len(source) for source in sources.values())
    tallies = {split: CorruptTally(lambda: total, data.max_corrupt_fraction) for split in sources}

    pack = pack or (lambda group: (form.pack(array, about.label) for array, about in group))

    def records(split: str, pictures: range) -> Iterator[bytes]:
        seen = views[split]
        examples = _read(
            sources[split], pictures, seen, num_threads=data.num_threads, tally=tallies[split]
        )
        progress, packed = Progress(len(pictures)), pictures.start
        for group in encoder.encode(examples, len(pictures), seen.count):
            progress.add(len(group))
            for number, (array, _) in enumerate(group, packed):
                check_finite(f"{form.kind} of {split} record {number}", array)
            packed += len(group)
            yield from pack(group)

    shard_writing.write_splits(directory, contents, records)


def _by_picture(group: Encoded, encoded: Array) -> Encoded:
    ends = np.cumsum([len(views) for views, _ in group])
    rows = np.split(np.asarray(encoded), ends)[: len(group)]  # the rest is padding
    return [(of_picture, about) for of_picture, (_, about) in zip(rows, group, strict=True)]


def _read(
    source: Source, pictures: range, views: Views, *, num_threads: int, tally: CorruptTally
) -> Iterator[tuple[UInt8[np.ndarray, "views _ _ 3"], Labelled]]:
    """Yield the views of every readable picture in order, read by several threads."""
    captions = getattr(source, "captions", ())

    def example(index: int) -> tuple[np.ndarray, Labelled] | None:
        try:
            found = source[index]
        except UnreadablePictureError as error:
            tally.add(error)
            return None
        about = Labelled(int(found["label"]), captions[index] if captions else ())
        return views.of(found["pixels"]), about

    dataset = grain.MapDataset.range(pictures.start, pictures.stop).map(example)
    options = grain.ReadOptions(num_threads, max(num_threads, PREFETCHED_PICTURES))
    iterator = iter(dataset.to_iter_dataset(options))
    try:
        yield from iterator  # pyright: ignore[reportReturnType] - grain leaves None out
    finally:
        iterator.close()
