"""Batches of one size, or of few sizes, one under way while another is used."""

import collections
import concurrent.futures
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

T = TypeVar("T")
U = TypeVar("U")

MAX_PADDED = 32
"""Larger batches are made as they are: padding would take longer than compiling."""
MAX_THREADS = 2
"""Batches at a time on a CPU: what more bring was not measured, and each takes its memory."""


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
    pending: list[T] = []
    for following in items:
        yield from pending
        pending = [following]
    yield from pending


def side_by_side(
    dispatch: Callable[[T], Any], fetch: Callable[[Any], U], items: Iterable[T], mesh: Mesh | None
) -> Generator[U, None, None]:
    """Yield `fetch(dispatch(item))` in the items' order; others are under way meanwhile.

    A CPU runs what one thread asks for in turn, and few programs fill its cores: there each item
    has a thread, after the first, which compiles. Elsewhere one item is dispatched ahead.

    Args:
        dispatch: asks the devices for an item.
        fetch: waits for them.
        items: the next one is taken when there is room for it.
        mesh: of the devices; more than one take part in every program, one after the other.
    """
    on_cpu = jax.default_backend() == "cpu" and (mesh is None or mesh.size == 1)
    threads = min(os.cpu_count() or 1, MAX_THREADS) if on_cpu else 1
    if threads == 1:
        yield from map(fetch, one_ahead(map(dispatch, items)))
        return
    pool = concurrent.futures.ThreadPoolExecutor(threads, "batches")
    pending: collections.deque[concurrent.futures.Future[U]] = collections.deque()
    try:
        for count, item in enumerate(items):
            pending.append(pool.submit(lambda item=item: fetch(dispatch(item))))
            if count == 0:
                pending[0].result()  # which raises before another is taken
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
