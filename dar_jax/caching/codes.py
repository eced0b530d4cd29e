"""`--mode=cache --config.cache.kind=codes`: a data set as the codes of a frozen tokenizer.

Training pictures are encoded in all crops that `config.data.crop` may draw: one for "center", ten
for "ten_crop" (the published recipe); each of them in all (2 P + 1)^2 places where
`config.data.padding` of P pixels may move it, and all of these mirrored as well with
`config.data.flip`. Held-out pictures are encoded in the centre crop. With `config.data.captions`
every record has the features of the picture's captions too.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator

import einops
import jax
import numpy as np

from dar_jax.caching.encoded import Encoded, FrozenEncoder, Views, write_encoded
from dar_jax.common import image as images
from dar_jax.common import model_dir
from dar_jax.common.typing import Array, Int, Params, UInt8
from dar_jax.data.base import DataConfig
from dar_jax.data.codes import CAPTIONS, FORM, MAX_CODEBOOK_SIZE, pack_captioned
from dar_jax.data.sources import SPLITS, load_pictures
from dar_jax.data.transforms import all_shifts, center_crop, ten_crop
from dar_jax.kinds.dar_prior import described
from dar_jax.kinds.dar_tokenizer import DarTokenizer
from dar_jax.kinds.loading import open_model
from dar_jax.models.dar.tokenizer import Tokenizer
from dar_jax.models.text.encoder import TextEncoder
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.parallel.workdir import open_workdir

CROPS_PER_DEVICE = 64
"""Encoded at a time; their distances to 16,384 codes take 1 GB."""
MAX_PADDING = 4
"""81 places."""
NUM_CROPS = {"center": 1, "ten_crop": 10}
CROPS = {"center": lambda pixels, size: center_crop(pixels, size)[None], "ten_crop": ten_crop}


def write_codes(
    data: DataConfig,
    tokenizer: str,
    workdir: str,
    *,
    pictures_per_shard: int,
    text_encoder: TextEncoder | None = None,
) -> None:
    """Write the codes of every split to `workdir`; shards that are there already are kept.

    Args:
        data: the pictures.
        tokenizer: model directory, as `model_dir.locate` takes it.
        workdir: of the cache.
        pictures_per_shard: records in one file.
        text_encoder: of the captions, if they are written.

    Raises:
        ValueError: the data or the tokenizer cannot be used, or the workdir holds another cache.
        OSError: the workdir cannot be written.
    """
    if data.crop not in CROPS:
        raise ValueError(
            f"config.data.crop={data.crop!r} never repeats a crop, so its codes cannot be cached; "
            f"use {' or '.join(CROPS)}"
        )
    if data.padding > MAX_PADDING:
        raise ValueError(
            f"config.data.padding={data.padding} moves a picture to {(2 * data.padding + 1) ** 2} "
            f"places, all of which would be encoded; use at most {MAX_PADDING}"
        )
    directory = model_dir.locate(tokenizer)
    model = open_tokenizer(directory, data.image_size)
    encoder = FrozenEncoder(model, directory, _encode, rows_per_device=CROPS_PER_DEVICE)
    sources = {split: load_pictures(data, split) for split in SPLITS}
    contents = {
        FORM.model: model_dir.fingerprint(directory),
        "num_tokens": model.config.num_tokens,
        "crop": data.crop,
        "flip": data.flip,
        "padding": data.padding or None,  # as where nobody asked yet
        CAPTIONS: text_encoder and described(text_encoder),
    }
    # What is held out is seen in one crop, as everywhere else.
    held_out = dataclasses.replace(data, crop="center", padding=0, flip=False)
    write_encoded(
        data,
        open_workdir(workdir),
        contents,
        form=FORM,
        sources=sources,
        encoder=encoder,
        views={"train": views_of(data), "test": views_of(held_out)},
        pictures_per_shard=pictures_per_shard,
        pack=text_encoder and functools.partial(_pack, text_encoder),
    )


def _pack(text_encoder: TextEncoder, group: Encoded) -> Iterator[bytes]:
    """Make records with captions, which are encoded together."""
    features, mask = text_encoder.encode([text for _, about in group for text in about.captions])
    first = 0
    for codes, about in group:
        rows = slice(first, first := first + len(about.captions))
        yield pack_captioned(codes, about.label, features[rows], mask[rows])


def views_of(config: DataConfig) -> Views:
    """The crops that training may see of a picture."""
    places = (2 * config.padding + 1) ** 2
    count = NUM_CROPS[config.crop] * places * (2 if config.flip else 1)
    return Views(count, functools.partial(crops_of, config=config))


def crops_of(
    pixels: UInt8[np.ndarray, "_ _ 3"], config: DataConfig
) -> UInt8[np.ndarray, "crops _ _ 3"]:
    """All crops [crops, size, size, 3] that training may see of a picture.

    Returns:
        The centre crop, or the ten in the order of `transforms.ten_crop`, each of them in all
        places of `transforms.all_shifts`; then, with `config.flip`, all of them mirrored.
    """
    crops = CROPS[config.crop](pixels, config.image_size)
    shifts = np.stack([all_shifts(crop, config.padding) for crop in crops])
    crops = einops.rearrange(shifts, "crops top left h w c -> (crops top left) h w c")
    return np.concatenate([crops, *([crops[:, :, ::-1]] if config.flip else [])])


def open_tokenizer(directory: pathlib.Path, image_size: int) -> FunctionalModel[Tokenizer]:
    """Read the tokenizer's architecture.

    Raises:
        ValueError: it cannot be read, is not a tokenizer, does not take images of this size, or its
            codes do not fit into 16 bits.
    """
    config = open_model(directory, DarTokenizer.name).architecture
    if not 0 < config.codebook_size <= MAX_CODEBOOK_SIZE:
        raise ValueError(
            f"{directory} has {config.codebook_size} codes, 1 to {MAX_CODEBOOK_SIZE} can be cached"
        )
    if config.image_size != image_size:
        raise ValueError(
            f"config.data.image_size={image_size}, but {directory} takes images of "
            f"{config.image_size} pixels; use that"
        )
    return FunctionalModel(Tokenizer, config, Compute())


@functools.partial(jax.jit, static_argnames="model")
def _encode(model: FunctionalModel[Tokenizer], params: Params, pixels: Array) -> Int[Array, "B N"]:
    with model.in_float32(params) as tokenizer:
        return tokenizer.encode(images.to_float(pixels)).tokens
