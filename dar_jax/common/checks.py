"""Checks of what callers hand in and of what is computed: shapes, ranges, finite numbers."""

import math
import numbers
from collections.abc import Sequence

import numpy as np

from dar_jax.common.typing import Any

MAX_SEED = 2**32 - 1
"""Keys are made of 32 bits of a seed: of larger ones the rest would be dropped in silence."""


Numbers = tuple[float, ...] | Sequence[float | int] | float | int
"""One number or several, as callers may write them; `read_numbers` makes a tuple."""


def check_shape(name: str, array: Any, expected: Sequence[int | str]) -> None:
    """Raise ValueError unless every axis has its size; a letter stands for any size."""
    if not hasattr(array, "shape"):
        raise ValueError(f"{name} is no array but of type {type(array).__name__}")
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


def check_rates(config: Any, *names: str) -> None:
    """Raise ValueError unless fields are probabilities below 1, such as those of dropout."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be in [0, 1)")


def check_positive(config: Any, *names: str) -> None:
    """Raise ValueError unless fields are above 0, and finite."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name}={getattr(config, name)} must be above 0")


def check_integers(name: str, array: Any, meaning: str) -> None:
    """Raise ValueError unless an array holds integers, and at least one of them.

    Args:
        name: of the array.
        array: of NumPy or JAX.
        meaning: what the integers are.
    """
    if not array.size:
        raise ValueError(f"{name} are empty, expected {meaning}")
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} are {array.dtype}, expected integers: {meaning}")


def check_labels(labels: Any, num_classes: int, *, null: bool = False) -> Any:
    """Return class labels as an array.

    Args:
        labels: one for every image.
        num_classes: of the model.
        null: `num_classes`, the label of no class, is one of them.

    Raises:
        ValueError: they are something else, or none.
    """
    labels = labels if hasattr(labels, "dtype") else np.asarray(labels)
    check_integers("labels", labels, f"classes in 0..{num_classes - 1}")
    check_shape("labels", labels, ("B",))
    check_range("labels", labels, num_classes + null)
    return labels.astype(np.int32)  # the null class need not fit what labels are of


def check_number(name: str, value: Any, kind: type = numbers.Real) -> None:
    """Raise ValueError unless a value is a number, or an integer if `kind` is `numbers.Integral`.

    Arrays are none, nor is what JAX puts into the place of numbers while it compiles.
    """
    if not isinstance(value, kind) or isinstance(value, bool):
        what = "an integer" if kind is numbers.Integral else "a number"
        raise ValueError(f"{name}={value!r} must be {what}")


def read_numbers(name: str, values: Numbers) -> tuple[float, ...]:
    """Return one number, or a sequence of them, as a tuple.

    Raises:
        ValueError: they are something else.
    """
    array = np.ravel(values)
    if array.size and array.dtype.kind not in "iuf":
        raise ValueError(f"{name}={values!r} must be a number, or several")
    return tuple(map(float, array))


def check_finite(name: str, array: Any) -> None:
    """Raise ValueError if a floating-point array holds NaN or infinity, with the first of them."""
    array = np.asarray(array)
    # Extended types such as bfloat16 have a kind of their own, integers are always finite.
    if array.dtype.kind in "iub":
        return
    finite = np.isfinite(array)
    if not finite.all():
        first = tuple(map(int, np.argwhere(~finite)[0])) if array.ndim else ()
        raise ValueError(
            f"{name}: {array.size - np.count_nonzero(finite)} of {array.size} numbers are not "
            f"finite, the first is {array[first]} at {first}"
        )


def check_seed(name: str, seed: int) -> None:
    """Raise ValueError unless a seed is in 0..`MAX_SEED`."""
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"{name}={seed} must be in 0..{MAX_SEED}")


def check_microbatch(
    microbatch: int | None, batch_size: int, num_candidates: int = 1
) -> int | None:
    """Return the microbatch if it is smaller than the batch, candidates of its images included.

    Raises:
        ValueError: it does not divide the batch.
    """
    if microbatch is None:
        return None
    check_number("microbatch", microbatch, numbers.Integral)
    if microbatch < 1 or batch_size % min(microbatch, batch_size):
        raise ValueError(f"microbatch={microbatch} must divide the batch of {batch_size} images")
    is_whole = microbatch >= batch_size * num_candidates
    return None if is_whole else min(microbatch, batch_size)
