"""A picture of what surprises a model of tokens: which of them carry the nats, and what they do."""

import functools

import jax
import numpy as np

from dar_jax.common import image as images
from dar_jax.common.batches import pad
from dar_jax.common.keys import image_keys
from dar_jax.common.typing import Float, Int, UInt8
from dar_jax.generation.batches import whole_batch
from dar_jax.models.dar import sampler
from dar_jax.pipelines.dar import TokenizerPipeline

CELL_SIZE = 128
"""Side of an image, so that the heading of its column is legible."""
BAR_HEIGHT = 32
BAR_COLOUR = (200, 60, 40)


def picture(
    tokenizer: TokenizerPipeline,
    pixels: UInt8[np.ndarray, "B H W 3"],
    indices: Int[np.ndarray, "B N"],
    nats: Float[np.ndarray, "B N"],
    names: list[str],
) -> UInt8[np.ndarray, "_ _ 3"]:
    """Draw a row per image: itself and its previews, the surprise of a group's tokens below each.

    All bars have one scale, that of the greatest surprise. Headings have a group's mean.

    Args:
        tokenizer: decodes the previews, from one noise.
        pixels: the images.
        indices: their codes.
        nats: surprise of every code, at least 0.
        names: of the rows.
    """
    config, count = tokenizer.config, len(pixels)
    put, size = tokenizer.put, whole_batch(tokenizer, count)
    rngs = put(image_keys(jax.random.key(0), size))
    noise = sampler.initial_noise(rngs, (config.image_size,) * 2)
    decode = jax.jit(functools.partial(sampler.decode_indices, tokenizer.model))
    after = decode(tokenizer.sampling_params, put(pad(indices, size)), noise).previews
    bounds = sampler.group_boundaries(config)
    cells, header = [_cell(pixels, nats[:, :0], 1.0)], ["image"]
    for group, tokens in enumerate(np.split(nats, bounds[:-1], axis=1), 1):
        header.append(f"{group}: {tokens.sum(axis=1).mean():.3g} nats")
        preview = np.full_like(pixels, 255)
        if bounds[group - 1] >= config.window:
            step = sampler.steps_of_groups(config, config.num_steps, group) - 1
            preview = np.asarray(images.to_pixels(after[step]))[:count]
        cells.append(_cell(preview, tokens, float(nats.max())))
    return images.labelled_grid(
        np.stack(cells, axis=1).reshape(-1, *cells[0].shape[1:]), names, len(cells), header
    )


def _cell(
    pixels: UInt8[np.ndarray, "B H W 3"], nats: Float[np.ndarray, "B n"], most: float
) -> UInt8[np.ndarray, "B h w 3"]:
    """Enlarge images and put a bar per token below each."""
    scale = max(1, CELL_SIZE // pixels.shape[2])
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    bars = np.full((len(pixels), BAR_HEIGHT, *pixels.shape[2:]), 255, np.uint8)
    if nats.shape[1]:
        token = np.arange(pixels.shape[2]) * nats.shape[1] // pixels.shape[2]
        heights = BAR_HEIGHT * nats[:, token] / most
        bars[np.arange(BAR_HEIGHT)[:, None] >= BAR_HEIGHT - heights[:, None]] = BAR_COLOUR
    return np.concatenate([pixels, bars], axis=1)
