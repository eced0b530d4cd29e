"""A picture of what a tokenizer or autoencoder keeps of an image."""

import pathlib

import jax
import numpy as np
from absl import logging

from dar_jax.common import image as images
from dar_jax.common.batches import pad
from dar_jax.common.typing import UInt8
from dar_jax.data.base import DataConfig
from dar_jax.data.sources import load_pictures
from dar_jax.data.transforms import center_crop
from dar_jax.generation.batches import whole_batch
from dar_jax.generation.config import SampleConfig
from dar_jax.generation.editing import read_picture
from dar_jax.losses.distortion import psnr
from dar_jax.pipelines.base import Autoencoder, check_sound, is_sound

NUM_PICTURES = 10


def reconstructions(
    model: Autoencoder, config: SampleConfig, data: DataConfig
) -> UInt8[np.ndarray, "H W 3"]:
    """Draw a row per picture: the original, previews, the last of which is the reconstruction.

    The pictures are `config.originals`, or the first held-out ones of the data.

    Raises:
        ValueError: a picture cannot be read, or the model takes none of `data.image_size`.
    """
    model.check_image_size(data.image_size)
    if not config.originals:
        count = min(NUM_PICTURES, len(load_pictures(data, "test")))
        names = [f"test:{index}" for index in range(count)]
    else:
        names = _split(config.originals)
    where = "config.sample.originals"
    pictures = [read_picture(where, name, data) for name in names]
    originals = np.stack([center_crop(picture, data.image_size) for picture in pictures])
    batch = pad(images.to_float(originals), whole_batch(model, len(originals)))
    sampling = config.reconstruction(model.sampling)
    steps = model.previews(batch, rng=jax.random.key(config.seed), sampling=sampling)
    steps = steps[:, : len(originals)]
    check_sound(is_sound(steps[-1]))
    previews = images.to_pixels(np.asarray(steps))
    quality = [psnr(originals[[i]], previews[-1][[i]]) for i in range(len(originals))]
    logging.info("PSNR of %d pictures: %.1f dB", len(quality), np.mean(quality))
    cells = np.concatenate([originals[None], previews]).swapaxes(0, 1)
    numbers = [f"step {step}" for step in range(1, len(previews))]
    return images.labelled_grid(
        cells.reshape(-1, *originals.shape[1:]),
        [f"{pathlib.Path(n).name}: {db:.1f} dB" for n, db in zip(names, quality, strict=True)],
        columns=1 + len(previews),
        header=["original", *numbers, "decoded"],
    )


def _split(names: tuple[str, ...]) -> list[str]:
    """Split what is one word on the command line: `a.png,b.png`."""
    return [part for name in names for part in ([name] if _is_file(name) else name.split(","))]


def _is_file(name: str) -> bool:
    return pathlib.Path(name).is_file()
