"""Checks of what callers hand in: shapes, ranges and parts of batches, said in one line."""

from collections.abc import Sequence

import numpy as np

from dar_jax.common.typing import Any


def check_shape(name: str, array: Any, expected: Sequence[int | str]) -> None:
    """Raise ValueError unless every axis has its size; a letter stands for any size."""
    shape = tuple(array.shape)
    fits = len(shape) == len(expected) and all(
        size == wanted or isinstance(wanted, str)
        for size, wanted in zip(shape, expected, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} has shape {shape}, expected ({', '.join(map(str, expected))})")


def check_range(name: str, values: Any, stop: int) -> None:
    """Raise ValueError unless all values are in 0 .. stop - 1."""
    values = np.asarray(values)
    wrong = values[(values < 0) | (values >= stop)]
    if wrong.size:
        raise ValueError(f"{name}: {wrong.flat[0]} is out of range, expected 0..{stop - 1}")


def check_microbatch(microbatch: int | None, batch_size: int) -> int | None:
    """Return the microbatch if it is smaller than the batch.

    Raises:
        ValueError: it does not divide the batch.
    """
    if microbatch is None:
        return None
    if microbatch < 1 or batch_size % min(microbatch, batch_size):
        raise ValueError(f"microbatch={microbatch} must divide the batch of {batch_size} images")
    return microbatch if microbatch < batch_size else None
