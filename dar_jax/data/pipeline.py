"""The input pipeline (grain): shuffled batches for training, ordered ones for evaluation.

A batch is `{"pixels": uint8 [B, H, W, 3], "label": int32 [B]}` in NumPy. The training iterator is
deterministic in `(config, seed)` and its position is saved with every checkpoint.
"""

from collections.abc import Iterator

import grain
import jax
import numpy as np

from dar_jax.data.sources import DataConfig, load_source

READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
"""Batches of in-memory pictures: one thread prepares the next while the step runs; more would
only contend for the interpreter."""


def train_iterator(config: DataConfig, seed: int) -> grain.DatasetIterator:
    """Return the endless iterator over this process's part of every global batch.

    Each epoch is reshuffled and visits every picture of the process's shard once; shards are
    disjoint. Batches may span two epochs, so none is short.

    Raises:
        ValueError: see `load_source`; or the batch does not divide over the processes.
    """
    index, count = jax.process_index(), jax.process_count()
    if config.batch_size % count:
        raise ValueError(
            f"batch_size {config.batch_size} does not divide over {count} processes; "
            f"use a multiple of {count}"
        )
    dataset = grain.MapDataset.source(load_source(config, "train")).seed(seed).shuffle()
    dataset = dataset[index::count].repeat().batch(config.batch_size // count)
    return iter(dataset.to_iter_dataset(READ_OPTIONS))


def eval_batches(config: DataConfig, split: str) -> Iterator[dict[str, np.ndarray]]:
    """Yield every picture of a split once, in a fixed order; the last batch may be short."""
    dataset = grain.MapDataset.source(load_source(config, split))
    yield from dataset.batch(config.batch_size).to_iter_dataset(READ_OPTIONS)
