"""Held-out crops of `tests.photographs` through several tokenizers, side by side.

    python -m tests.reconstructions DIR PICTURE NAME=MODEL_DIR ...

draws a row for a crop of every class: the original, then what each tokenizer makes of it from the
same noise.
"""

import sys

import jax
import numpy as np
from PIL import Image

import dar_jax
from dar_jax.common import image as images
from dar_jax.data.sources import DataConfig, load_source
from tests.photographs import SIZE


def one_of_each_class(directory: str) -> tuple[np.ndarray, list[str]]:
    """Return pixels [classes, H, W, 3] of every class's crop of most contrast, and their names."""
    source = load_source(DataConfig(source="folder", path=directory, image_size=SIZE), "test")
    examples = [source[index] for index in sorted(range(len(source)), key=source.name)]
    labels = np.array([example["label"] for example in examples])
    pixels = np.stack([example["pixels"] for example in examples])
    contrast = pixels.std(axis=(1, 2)).mean(axis=-1)
    chosen = [np.argmax(contrast * (labels == label)) for label in range(source.num_classes)]
    return pixels[chosen], list(source.class_names)


def main(directory: str, picture: str, *tokenizers: str) -> None:
    pixels, class_names = one_of_each_class(directory)
    header, columns = ["original"], [pixels]
    for name, model in (text.split("=", 1) for text in tokenizers):
        tokenizer = dar_jax.from_pretrained(model)
        indices = tokenizer.encode(images.to_float(pixels))
        columns.append(
            np.asarray(images.to_pixels(tokenizer.decode(indices, rng=jax.random.key(0))))
        )
        header.append(name)
    cells = np.stack(columns, axis=1).reshape(-1, *pixels.shape[1:])
    grid = images.labelled_grid(cells, class_names, len(columns), header=header)
    Image.fromarray(grid).save(picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
