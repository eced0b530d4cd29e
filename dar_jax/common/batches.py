"""Batches of one size, or of few sizes, one under way while another is used."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np

T = TypeVar("T")

MAX_PADDED = 32
"""Larger batches are made as they are: padding would take longer than compiling."""


def pad(values: np.ndarray, size: int) -> np.ndarray:
    """Repeat the last row up to `size` rows: another batch size would compile everything again."""
    return np.pad(values, [(0, size - len(values))] + [(0, 0)] * (values.ndim - 1), "edge")


def padded_size(size: int, shards: int) -> int:
    """The next power of two times `shards`, up to `MAX_PADDED`; other sizes stay as they are."""
    if size % shards or not 0 < size <= MAX_PADDED:
        return size
    return shards * 2 ** (size // shards - 1).bit_length()


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """Hand out each item after the next one has been made (here: dispatched)."""
    items = iter(items)
    pending = next(items)
    for following in items:
        yield pending
        pending = following
    yield pending
