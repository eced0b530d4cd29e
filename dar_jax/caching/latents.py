"""`--mode=cache --config.cache.kind=latents`: a data set as the latents of a frozen VAE.

Of every picture the moments of its centre crop and of the mirrored crop are written, in float32.
"""

import functools

import jax
import numpy as np

from dar_jax.caching.encoded import FrozenEncoder, Views, write_encoded
from dar_jax.common import image as images
from dar_jax.common import model_dir
from dar_jax.common.typing import Array, Float, Params, UInt8
from dar_jax.data.base import DataConfig
from dar_jax.data.latents import FORM
from dar_jax.data.sources import SPLITS, load_pictures
from dar_jax.data.transforms import center_crop, mirror
from dar_jax.kinds.kl_vae import KlVaeKind
from dar_jax.kinds.loading import open_model
from dar_jax.models.kl_vae import KlVae
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.parallel.workdir import open_workdir

PIXELS_PER_DEVICE = 16 * 256**2
"""Encoded at a time; the released encoder's largest activation then takes 0.5 GB."""


def write_latents(data: DataConfig, vae: str, workdir: str, *, pictures_per_shard: int) -> None:
    """Write the latents of every split to `workdir`; shards that are there already are kept.

    Args:
        data: the pictures.
        vae: model directory.
        workdir: of the cache.
        pictures_per_shard: records in one file.

    Raises:
        ValueError: the data or the VAE cannot be used, or the workdir holds another cache.
        OSError: the workdir cannot be written.
    """
    opened = open_model(vae, KlVaeKind.name)
    directory, config = opened.path, opened.architecture
    grid = config.latent_grid(data.image_size, data.image_size)
    model = FunctionalModel(KlVae, config, Compute())
    rows = max(1, PIXELS_PER_DEVICE // data.image_size**2)
    encoder = FrozenEncoder(model, directory, _encode, rows_per_device=rows)
    views = Views(2, functools.partial(both_ways, size=data.image_size))
    write_encoded(
        data,
        open_workdir(workdir),
        {
            FORM.model: model_dir.fingerprint(directory),
            "shape": [*grid, 2 * config.latent_channels],
        },
        form=FORM,
        sources={split: load_pictures(data, split) for split in SPLITS},
        encoder=encoder,
        views=dict.fromkeys(SPLITS, views),
        pictures_per_shard=pictures_per_shard,
    )


def both_ways(pixels: UInt8[np.ndarray, "_ _ 3"], size: int) -> UInt8[np.ndarray, "2 _ _ 3"]:
    """The centre crop and its mirror image."""
    crop = center_crop(pixels, size)
    return np.stack([crop, mirror(crop)])


@functools.partial(jax.jit, static_argnames="model")
def _encode(
    model: FunctionalModel[KlVae], params: Params, pixels: Array
) -> Float[Array, "B h w C2"]:
    with model.in_float32(params) as vae:
        return vae.encode(images.to_float(pixels))
