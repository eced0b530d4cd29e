"""Input of the frozen DINOv2 ViT-B/14 (Oquab et al. 2023, arXiv:2304.07193)."""

import jax.numpy as jnp

from dar_jax.common.image import resize_bicubic
from dar_jax.common.typing import Array, Float

IMAGE_SIZE = 224
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""ImageNet statistics of images in [0, 1]."""


def preprocess(image: Float[Array, "B H W 3"]) -> Float[Array, "B 224 224 3"]:
    """Standardise images in [-1, 1], then resize them, in this order as the reference does."""
    standardised = ((image + 1.0) / 2.0 - jnp.array(MEAN)) / jnp.array(STD)
    return resize_bicubic(standardised, (IMAGE_SIZE, IMAGE_SIZE))
