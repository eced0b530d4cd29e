"""Work of the KL autoencoder, from its config alone.

One multiply-add is 2 FLOPs; see `models.dar.work` for what is counted.
"""

from dar_jax.common.image import RGB
from dar_jax.models.dar.work import (
    ATTENTION_PROJECTIONS,
    TRAINING_FORWARDS,
    attention_flops,
    linear_flops,
)
from dar_jax.models.kl_vae import KlVaeConfig

KERNEL = 3 * 3


def train_flops(config: KlVaeConfig, image_size: int) -> int:
    """FLOPs of one training image."""
    forward = encode_flops(config, image_size) + decode_flops(config, image_size)
    return TRAINING_FORWARDS * forward


def encode_flops(config: KlVaeConfig, image_size: int) -> int:
    """FLOPs from one square image to its moments."""
    widths, channels = config.widths, 2 * config.latent_channels
    pixels = _pixels(config, image_size)
    flops = linear_flops(pixels[0], KERNEL * RGB, config.width)
    for level, (dim, width) in enumerate(zip((config.width, *widths[:-1]), widths, strict=True)):
        flops += _level_flops(pixels[level], dim, width, config.num_blocks)
        if level in config.attention_levels:
            flops += config.num_blocks * _attention_flops(pixels[level], width)
        if level < len(widths) - 1:
            flops += linear_flops(pixels[level + 1], KERNEL * width, width)
    flops += _middle_flops(pixels[-1], widths[-1])
    flops += linear_flops(pixels[-1], KERNEL * widths[-1], channels)
    return flops + linear_flops(pixels[-1], channels, channels)


def decode_flops(config: KlVaeConfig, image_size: int) -> int:
    """FLOPs from one latent to its square image."""
    widths, channels = config.widths, config.latent_channels
    pixels = _pixels(config, image_size)
    flops = linear_flops(pixels[-1], channels, channels)
    flops += linear_flops(pixels[-1], KERNEL * channels, widths[-1])
    flops += _middle_flops(pixels[-1], widths[-1])
    for level, (dim, width) in enumerate(zip((*widths[1:], widths[-1]), widths, strict=True)):
        flops += _level_flops(pixels[level], dim, width, config.num_blocks + 1)
        if level > 0:
            flops += linear_flops(pixels[level - 1], KERNEL * width, width)
    return flops + linear_flops(pixels[0], KERNEL * widths[0], RGB)


def _pixels(config: KlVaeConfig, image_size: int) -> list[int]:
    """Positions of every level."""
    return [(image_size >> level) ** 2 for level in range(len(config.width_factors))]


def _level_flops(pixels: int, dim: int, width: int, num_blocks: int) -> int:
    """Residual blocks of one level, `dim` channels coming in."""
    convolutions = linear_flops(pixels, KERNEL * dim, width)
    convolutions += (2 * num_blocks - 1) * linear_flops(pixels, KERNEL * width, width)
    return convolutions + (0 if dim == width else linear_flops(pixels, dim, width))


def _middle_flops(pixels: int, width: int) -> int:
    """Two residual blocks and attention."""
    return _level_flops(pixels, width, width, 2) + _attention_flops(pixels, width)


def _attention_flops(pixels: int, width: int) -> int:
    projections = ATTENTION_PROJECTIONS * linear_flops(pixels, width, width)
    return projections + attention_flops(pixels**2, width)
