"""The input pipeline (grain): shuffled, augmented batches for training, ordered ones to evaluate.

A batch is `{"pixels": uint8 [B, H, W, 3], "label": int32 [B]}` in NumPy; sources of codes and of
latents have "codes" or "moments" for pixels. With `data.num_references` a training batch has a
second axis, [B, references, ...], of pictures of one class that are cropped independently.

Training examples form one endless sequence: every epoch is a new order of all pictures, and how a
picture is cropped is drawn from (seed, epoch, picture). Batch n is the sequence's n-th piece of
`batch_size` examples, whatever number of processes, workers and threads read it; a batch may span
two epochs, so none is short and no picture is dropped.

A picture that cannot be read is replaced by the next one that can, so that the others keep their
places.
"""

import dataclasses
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import cast

import grain
import grain.experimental
import numpy as np
from absl import flags

from dar_jax.common import interrupts
from dar_jax.common.typing import Any, UInt8
from dar_jax.data import references
from dar_jax.data.base import AUTO, DataConfig, EncodedSource, Source
from dar_jax.data.codes import draw_caption
from dar_jax.data.decode import CorruptTally, UnreadablePictureError
from dar_jax.data.sources import count_pictures, load_source
from dar_jax.data.transforms import CROPS, center_crop, mirror, random_shift

PREFETCHED_BATCHES = 2
FEW_CORES = 4
"""On which threads read faster than processes."""
MAX_AUTO_WORKERS = 16
"""Each has the list of all pictures, and takes seconds to start."""
FLIP_PROBABILITY = 0.5


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingExamples:
    """One part of every batch from `first_batch` on, example by example.

    Attributes:
        source: of the pictures.
        order: position in the endless sequence -> index of the picture.
        config: the data.
        seed: of the augmentation.
        part: which part of every batch, of how many.
        first_batch: number of the batch to begin with.
        tally: of the unreadable pictures.
    """

    source: Source
    order: grain.MapDataset
    config: DataConfig
    seed: int
    part: tuple[int, int]
    first_batch: int
    tally: CorruptTally

    @property
    def part_size(self) -> int:
        """Examples of one batch."""
        return self.config.batch_size // self.part[1]

    def __call__(self, number: int) -> dict[str, Any]:
        """Return the example `number` of this part."""
        position = self._position(number)
        picture = cast(int, self.order[position])  # only a filter gives None
        example = self._read(picture)
        rng = np.random.default_rng([self.seed, position // len(self.source), picture])
        if references.MEMBERS not in example:
            return training_view(example, self.config, rng)
        views = [training_view(m, self.config, rng) for m in example[references.MEMBERS]]
        stacked = {name: np.stack([view[name] for view in views]) for name in views[0]}
        return {**stacked, "label": example["label"]}

    def _position(self, number: int) -> int:
        batch, offset = divmod(number, self.part_size)
        index, count = self.part
        return ((self.first_batch + batch) * count + index) * self.part_size + offset

    def suspects(self, batch: int) -> list[str]:
        """Name the records of this part of a batch that are not finite; if none is, all of them."""
        first = (batch - self.first_batch) * self.part_size
        names = {self._name(first + i): self(first + i) for i in range(self.part_size)}
        wrong = [name for name, example in names.items() if not _is_finite(example)]
        return sorted(wrong or names)

    def _name(self, number: int) -> str:
        index = cast(int, self.order[self._position(number)])
        name = getattr(self.source, "name", None)
        return name(index) if name else f"record {index}"

    def _read(self, index: int) -> dict[str, Any]:
        """Read the picture, or the first readable one after it; the tally ends the search."""
        while True:
            try:
                return self.source[index]
            except UnreadablePictureError as error:
                self.tally.add(error)
            index = (index + 1) % len(self.source)


def _is_finite(example: dict[str, Any]) -> bool:
    return all(np.isfinite(array).all() for array in example.values())


def training_view(
    example: dict[str, Any], config: DataConfig, rng: np.random.Generator
) -> dict[str, Any]:
    """Draw what training sees of a picture this time; of codes the task draws the crop."""
    example = draw_caption(example, rng)
    if "pixels" in example:
        return {**example, "pixels": augment(example["pixels"], config, rng)}
    if "moments" in example:
        version = int(config.flip and rng.random() < FLIP_PROBABILITY)
        return {**example, "moments": example["moments"][version]}
    return example


def held_out_view(example: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    """Return what evaluation sees of a picture: the centre, and the first caption."""
    example = draw_caption(example)
    if "pixels" in example:
        return {**example, "pixels": center_crop(example["pixels"], config.image_size)}
    if "moments" in example:
        return {**example, "moments": example["moments"][0]}
    return example


def augment(
    pixels: UInt8[np.ndarray, "_ _ 3"], config: DataConfig, rng: np.random.Generator
) -> UInt8[np.ndarray, "_ _ 3"]:
    """Crop a picture, move it, and mirror it or not, as the config says."""
    pixels = CROPS[config.crop](pixels, config.image_size, rng)
    if config.padding:
        pixels = random_shift(pixels, config.padding, rng)
    return mirror(pixels) if config.flip and rng.random() < FLIP_PROBABILITY else pixels


class TrainIterator(grain.DatasetIterator):
    """Endless batches; its state is the number of the next one, whoever reads it."""

    def __init__(self, examples: TrainingExamples):
        super().__init__()
        self._examples = examples
        self._next = examples.first_batch
        self._batches = None
        self._waited = 0.0
        self._waited_since, self._since = self._next, time.monotonic()

    @property
    def source(self) -> Source:
        return self._examples.source

    def take_wait(self) -> tuple[float, float]:
        """Return how long a batch was waited for since the last call.

        The mean in seconds, and the share of all time; nothing of the first batch, for which
        reading begins.
        """
        now, count = time.monotonic(), self._next - self._waited_since
        mean, share = self._waited / max(1, count), self._waited / max(1e-9, now - self._since)
        self._waited, self._waited_since, self._since = 0.0, self._next, now
        return mean, share

    def advice(self, cores: int) -> str:
        """Say which key makes reading faster on so many cores."""
        config, workers = self._examples.config, cores // 2
        current = num_workers(config, self.source, cores)
        if current < workers and cores > FEW_CORES:
            return f"raise config.data.num_workers={current}, e.g. to {workers}"
        if config.num_threads < cores:
            return f"raise config.data.num_threads={config.num_threads} to {cores}"
        return "all cores read; --mode=cache writes the form that is read fastest"

    def __next__(self) -> dict[str, np.ndarray]:
        start = time.monotonic()
        begins = self._batches is None
        if self._batches is None:
            self._batches = self._open()
        batch = next(self._batches)
        self._next += 1
        if begins:
            self._waited_since, self._since = self._next, time.monotonic()
        else:
            self._waited += time.monotonic() - start
        return batch

    def suspects(self, batch: int) -> list[str]:
        """See `TrainingExamples.suspects`."""
        return self._examples.suspects(batch)

    def get_state(self) -> dict[str, int]:
        return {"next_index": self._next, "batch_size": self._examples.config.batch_size}

    def set_state(self, state: dict[str, int]) -> None:
        """Go on with the batch of `state`, or, if batches have another size, with its pictures."""
        self.close()
        size = self._examples.config.batch_size
        number = state["next_index"] * state.get("batch_size", size) // size
        self._next = self._waited_since = number

    def start_prefetch(self) -> None:
        """Nothing to do: reading starts with the first batch."""

    def close(self) -> None:
        """Stop reading ahead."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _open(self) -> grain.DatasetIterator:
        examples = dataclasses.replace(self._examples, first_batch=self._next)
        config, size = examples.config, examples.part_size
        numbers = grain.MapDataset.range(sys.maxsize).map(examples)
        count = num_workers(config, examples.source, usable_cores())
        if not count:
            return _read_ahead(numbers, config.num_threads, size)
        if not flags.FLAGS.is_parsed():  # from Python; grain asks for its own when it starts some
            flags.FLAGS.mark_as_parsed()
        options = grain.ReadOptions(config.num_threads, max(config.num_threads, 2))
        workers = grain.MultiprocessingOptions(count, per_worker_buffer_size=1)
        # Whole batches go round the workers, so that they come in the same order without them.
        batches = numbers.batch(size).to_iter_dataset(options)
        return iter(batches.mp_prefetch(workers, worker_init_fn=_live_as_long_as_the_trainer))


def _live_as_long_as_the_trainer(index: int, count: int) -> None:
    """Ignore in a reading process what tells the whole group to stop; end with the trainer."""
    for number in interrupts.handled():
        signal.signal(number, signal.SIG_IGN)
    trainer = multiprocessing.parent_process()
    assert trainer is not None  # this is another process

    def follow() -> None:
        trainer.join()
        os._exit(0)

    threading.Thread(target=follow, daemon=True).start()


def num_workers(config: DataConfig, source: Source, cores: int) -> int:
    """Return the number of reading processes, which `auto` leaves to the cores.

    Arrays in memory, codes and latents are read faster than they come from another process.
    """
    if config.num_workers != AUTO:
        return int(config.num_workers)
    pictures = source.source if isinstance(source, references.GroupSource) else source
    decodes = isinstance(pictures, EncodedSource)
    return min(cores // 2, MAX_AUTO_WORKERS) if decodes and cores > FEW_CORES else 0


def usable_cores() -> int:
    """Cores that this process may run on: fewer than there are, where a job was given a part."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def train_iterator(config: DataConfig, seed: int, part: tuple[int, int] = (0, 1)) -> TrainIterator:
    """Return the endless iterator over one part of every global batch.

    The parts of batch n, one after the other, are the same for any number of parts, and so is the
    iterator's state: a run may go on with another number of processes.

    Args:
        config: the data.
        seed: of order and augmentation.
        part: which part, of how many; see `parallel.sharding.batch_part`.

    Raises:
        ValueError: see `load_source`; the batch does not divide into the parts; or, while reading,
            too many pictures cannot be read.
    """
    _, count = part
    if config.batch_size % count:
        raise ValueError(
            f"batch_size {config.batch_size} does not divide over {count} processes; "
            f"use a multiple of {count}"
        )
    source = references.group(load_source(config, "train"), config, seed)
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    pictures = getattr(source, "source", source)  # groups of pictures have one
    tally = CorruptTally(pictures.__len__, config.max_corrupt_fraction)
    return TrainIterator(TrainingExamples(source, order, config, seed, part, 0, tally))


def eval_batches(
    config: DataConfig, split: str, batch_size: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Yield every readable picture of a split once, cropped at the centre, in a fixed order.

    Args:
        config: the data.
        split: "train" or "test".
        batch_size: of all batches but the last, which may be short; None is the config's.

    Raises:
        ValueError: see `load_source`; or too many pictures cannot be read.
    """
    source = load_source(config, split)
    tally = evaluation_tally(config)

    def example(index: int) -> dict[str, Any] | None:
        try:
            found = source[index]
        except UnreadablePictureError as error:
            tally.add(error)
            return None
        return held_out_view(found, config)

    dataset = grain.MapDataset.range(len(source)).map(example)
    batches = _read_ahead(dataset, config.num_threads, batch_size or config.batch_size)
    try:
        yield from batches
    finally:
        batches.close()


def evaluation_tally(config: DataConfig) -> CorruptTally:
    """Return the tally for pictures of one split: a part of all pictures may be unreadable.

    Of few held-out ones a single one would be too many.
    """
    count = functools.partial(count_pictures, config)
    return CorruptTally(count, config.max_corrupt_fraction)


def _read_ahead(
    dataset: grain.MapDataset, num_threads: int, batch_size: int
) -> grain.DatasetIterator:
    """Read examples in several threads and batch them in another; None is not an example."""
    options = grain.ReadOptions(num_threads, max(num_threads, PREFETCHED_BATCHES * batch_size))
    batches = dataset.to_iter_dataset(options).batch(batch_size)
    return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=1))
