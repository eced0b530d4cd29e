"""Pictures of what can be kept of an image: its first tokens (the layout), or some of its pixels.

The first tokens of an image fix its layout, whatever class the others are drawn for (D-AR, section
4.3); several draws with one class are variations of it. In-painting keeps pixels instead.
"""

import re
from collections.abc import Sequence

import numpy as np
from absl import logging

from dar_jax.common import image as images
from dar_jax.common.batches import pad
from dar_jax.common.files import read_regular
from dar_jax.common.typing import Bool, Int, UInt8
from dar_jax.data.base import SPLITS, DataConfig
from dar_jax.data.decode import MAX_FILE_BYTES, UnreadablePictureError, decode
from dar_jax.data.sources import load_pictures
from dar_jax.data.transforms import center_crop
from dar_jax.generation.batches import class_name, drawn_of, generate, whole_batch
from dar_jax.generation.config import SampleConfig
from dar_jax.generation.image_set import label_array
from dar_jax.pipelines.base import Pipeline

SOURCE_PICTURE = re.compile(rf"({'|'.join(SPLITS)}):(\d+)")
"""Names a picture of the data source: `test:3`."""
WHITE = 128
"""Least value of a white pixel in a mask."""
GREY = 128
"""What is drawn where a picture is redrawn."""


def prefixes(
    pipeline: Pipeline, config: SampleConfig, data: DataConfig
) -> UInt8[np.ndarray, "H W 3"]:
    """Draw a row per number of kept tokens: the reference, then every label or the variations.

    Images of one column draw the same noise, so that only the prefix tells them apart.

    Raises:
        ValueError: the picture cannot be read, or a label or number of tokens is out of range.
    """
    _check_prefix_tokens(config.prefix_tokens, pipeline.prior.config.num_tokens)
    classes = drawn_of(pipeline.prior.config, pipeline.class_names, config)
    if config.variations:
        _check_one_class(f"variations={config.variations}", classes)
    reference, tokens = _reference(pipeline, "prefix_image", config.prefix_image, data)
    labels = np.repeat(label_array(classes), config.variations or 1)
    rows = []
    for count in config.prefix_tokens:
        logging.info("%d of %d tokens kept", count, len(tokens))
        prefix = np.repeat(tokens[None, :count], len(labels), axis=0)
        drawn = [batch.previews[-1] for batch in generate(pipeline, labels, config, prefix=prefix)]
        rows += [reference[None], *drawn]
    return images.labelled_grid(
        np.concatenate(rows),
        [f"{count} token{'s' * (count != 1)}" for count in config.prefix_tokens],
        columns=1 + len(labels),
        header=["reference", *(class_name(pipeline, label) for label in labels.tolist())],
    )


def interpolation(
    pipeline: Pipeline, config: SampleConfig, data: DataConfig
) -> UInt8[np.ndarray, "H W 3"]:
    """Draw a row per number of kept tokens: two pictures, and images whose first tokens lie between
    theirs. All draw the same noise.

    Raises:
        ValueError: a picture cannot be read, more than one label, fewer than two images, or a
            number of tokens is out of range.
    """
    if config.images_per_class < 2:
        raise ValueError(
            f"config.sample.images_per_class={config.images_per_class} must be at least 2 with "
            "prefix_image_to: both ends are included"
        )
    _check_prefix_tokens(config.prefix_tokens, pipeline.prior.config.num_tokens)
    classes = drawn_of(pipeline.prior.config, pipeline.class_names, config)
    _check_one_class("images between two pictures", classes)
    pictures = {name: getattr(config, name) for name in ("prefix_image", "prefix_image_to")}
    ends = [_reference(pipeline, name, picture, data) for name, picture in pictures.items()]
    indices = np.stack([tokens for _, tokens in ends])
    between = np.asarray(pipeline.autoencoder.between(indices, config.images_per_class))
    rows = []
    for count in config.prefix_tokens:
        # One image a call: each is the first of its call, which decides its noise.
        drawn = [
            batch.previews[-1]
            for prefix in between[:, None, :count]
            for batch in generate(pipeline, label_array(classes), config, prefix=prefix)
        ]
        rows += [ends[0][0][None], *drawn, ends[1][0][None]]
    return images.labelled_grid(
        np.concatenate(rows),
        [f"{count} token{'s' * (count != 1)}" for count in config.prefix_tokens],
        columns=2 + len(between),
        header=["from", *[""] * len(between), "to"],
    )


def _reference(
    pipeline: Pipeline, name: str, picture: str, data: DataConfig
) -> tuple[UInt8[np.ndarray, "H W 3"], Int[np.ndarray, " N"]]:
    """Read the picture of a config key, as large as images are drawn, and encode it."""
    pixels = read_picture(f"config.sample.{name}", picture, data)
    cropped = center_crop(pixels, pipeline.image_size)[None]
    batch = pad(images.to_float(cropped), whole_batch(pipeline, 1))
    tokens = np.asarray(pipeline.autoencoder.encode(batch))[0]
    return center_crop(pixels, pipeline.output_size), tokens


def inpainting(
    pipeline: Pipeline, config: SampleConfig, data: DataConfig
) -> UInt8[np.ndarray, "H W 3"]:
    """Draw a row per label: the picture, what is kept of it, and images that keep it.

    Raises:
        ValueError: picture or mask cannot be read or differ in size, or a label is out of range.
    """
    size = pipeline.image_size
    classes = drawn_of(pipeline.prior.config, pipeline.class_names, config)
    picture = read_picture("config.sample.inpaint_image", config.inpaint_image, data)
    redrawn = read_mask(config.inpaint_mask, picture, size, data)
    original = center_crop(picture, size)[None]
    labels = np.repeat(label_array(classes), config.images_per_class)
    per_image = dict(
        known=np.repeat(images.to_float(original), len(labels), axis=0),
        mask=np.repeat(~redrawn[None], len(labels), axis=0),
    )
    drawn = [batch.previews[-1] for batch in generate(pipeline, labels, config, **per_image)]
    shown = center_crop(picture, pipeline.output_size)[None]
    hidden = read_mask(config.inpaint_mask, picture, pipeline.output_size, data)
    kept = np.where(hidden[..., None], np.uint8(GREY), shown)
    by_class = np.concatenate(drawn).reshape(len(classes), -1, *shown.shape[1:])
    rows = [np.concatenate([shown, kept, of_class]) for of_class in by_class]
    return images.labelled_grid(
        np.concatenate(rows),
        [class_name(pipeline, label) for label in classes],
        columns=2 + config.images_per_class,
        header=["original", "kept"] + [""] * config.images_per_class,
    )


def read_picture(where: str, name: str, data: DataConfig) -> UInt8[np.ndarray, "H W 3"]:
    """Read a picture file, or the picture of the data source that is called `SPLIT:INDEX`.

    Args:
        where: config key, for error messages.
        name: path or name.
        data: the data source.

    Raises:
        ValueError: it cannot be read, or the split has no such picture.
    """
    try:
        if match := SOURCE_PICTURE.fullmatch(name):
            source, index = load_pictures(data, match[1]), int(match[2])
            if index >= len(source):
                raise ValueError(f"{where}={name}: the split has pictures 0..{len(source) - 1}")
            return source[index]["pixels"]
        return decode(read_regular(name, MAX_FILE_BYTES), name)
    except OSError as error:
        raise ValueError(f"{where}: cannot read {name}: {error.strerror}") from error
    except UnreadablePictureError as error:
        raise ValueError(f"{where}: cannot read {error}") from error


def read_mask(
    name: str, picture: UInt8[np.ndarray, "h w 3"], size: int, data: DataConfig
) -> Bool[np.ndarray, "H W"]:
    """Read the mask of a picture and crop it like the picture; True (white) is redrawn.

    Raises:
        ValueError: it cannot be read, is of another size, or has no white pixel.
    """
    where = "config.sample.inpaint_mask"
    mask = read_picture(where, name, data)
    if mask.shape != picture.shape:
        (height, width), (rows, columns) = mask.shape[:2], picture.shape[:2]
        raise ValueError(
            f"{where}={name} is {width} x {height} pixels large, its picture {columns} x {rows}"
        )
    redrawn = center_crop(mask, size).mean(axis=-1) >= WHITE
    if not redrawn.any():
        raise ValueError(f"{where}={name} is white nowhere: there is nothing to redraw")
    return redrawn


def _check_one_class(what: str, classes: Sequence[int | str]) -> None:
    if len(classes) != 1:
        raise ValueError(
            f"{what} are of one class, not {len(classes)}: set config.sample.labels (or prompts) "
            "to it"
        )


def _check_prefix_tokens(counts: tuple[int, ...], num_tokens: int) -> None:
    wrong = [count for count in counts if not 0 <= count < num_tokens]
    if wrong or not counts:
        raise ValueError(
            f"config.sample.prefix_tokens={counts}: expected numbers in 0..{num_tokens - 1}"
        )
