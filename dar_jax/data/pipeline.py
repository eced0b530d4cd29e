"""The input pipeline (grain): shuffled batches for training, ordered ones for evaluation.

A batch is `{"pixels": uint8 [B, H, W, 3], "label": int32 [B]}` in NumPy. The training iterator is
deterministic in `(config, seed)` and its position is saved with every checkpoint.
"""

from collections.abc import Iterator

import grain
import numpy as np

from dar_jax.data.sources import DataConfig, load_source

READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
"""Batches of in-memory pictures: one thread prepares the next while the step runs; more would
only contend for the interpreter."""


def train_iterator(
    config: DataConfig, seed: int, part: tuple[int, int] = (0, 1)
) -> grain.DatasetIterator:
    """Return the endless iterator over one part of every global batch.

    Each epoch is reshuffled and visits every picture once; batches may span two epochs, so none is
    short. The parts of batch n, one after the other, are the same for any number of parts, and so
    is the iterator's state: a run may go on with another number of processes.

    Args:
        config: the data.
        seed: of the order.
        part: which part, of how many; see `training.sharding.batch_part`.

    Raises:
        ValueError: see `load_source`; or the batch does not divide into the parts.
    """
    index, count = part
    if config.batch_size % count:
        raise ValueError(
            f"batch_size {config.batch_size} does not divide over {count} processes; "
            f"use a multiple of {count}"
        )
    dataset = grain.MapDataset.source(load_source(config, "train")).seed(seed).shuffle()
    dataset = dataset.repeat().batch(config.batch_size // count)[index::count]
    return iter(dataset.to_iter_dataset(READ_OPTIONS))


def eval_batches(config: DataConfig, split: str) -> Iterator[dict[str, np.ndarray]]:
    """Yield every picture of a split once, in a fixed order; the last batch may be short."""
    dataset = grain.MapDataset.source(load_source(config, split))
    yield from dataset.batch(config.batch_size).to_iter_dataset(READ_OPTIONS)
