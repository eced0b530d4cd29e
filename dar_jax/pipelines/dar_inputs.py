"""Checks of what callers of the D-AR models hand in: labels, tokens, steps, pictures."""

import numbers

import jax.numpy as jnp
import numpy as np

from dar_jax.common.checks import (
    check_integers,
    check_labels,
    check_number,
    check_range,
    check_shape,
)
from dar_jax.common.image import as_image
from dar_jax.common.typing import Any, Array
from dar_jax.flow.times import check_num_steps
from dar_jax.models.dar import sampler
from dar_jax.models.dar.llama import LlamaConfig
from dar_jax.models.dar.tokenizer import TokenizerConfig


def check_condition(labels: Any, config: LlamaConfig, *, null: bool = False) -> np.ndarray | Array:
    """Return labels (or captions) as an array.

    Args:
        labels: classes, or captions.
        config: of the prior.
        null: whether `num_classes`, the label of no class, is one of them.

    Raises:
        ValueError: another shape or type, or a label that is not a class.
    """
    if config.caption_dim is None:
        return check_labels(labels, config.num_classes, null=null)
    captions = labels if isinstance(labels, Array) else np.asarray(labels)
    check_shape("captions", captions, ("B", config.condition_tokens, config.caption_dim))
    return captions


def check_caption_mask(mask: Any, batch_size: int, config: LlamaConfig) -> Array | None:
    """Return the mask of captions as booleans.

    Raises:
        ValueError: another shape, other values than 0 and 1, or a prior of classes.
    """
    if mask is None:
        return None
    if config.caption_dim is None:
        raise ValueError("caption_mask is for models of captions: leave it out for classes")
    check_shape("caption_mask", mask, (batch_size, config.condition_tokens))
    if not np.isin(mask, (0, 1)).all():
        raise ValueError("caption_mask must hold 0 (padding) and 1 (a token) only")
    return jnp.asarray(mask, bool)


def as_indices(indices: Any, codebook_size: int) -> np.ndarray | Array:
    """Return tokens as an array.

    Raises:
        ValueError: another type, or one out of the codebook.
    """
    indices = indices if isinstance(indices, Array) else np.asarray(indices)
    check_integers("indices", indices, "tokens")
    check_range("indices", indices, codebook_size)
    return indices


def check_prefix(prefix: Any, batch_size: int, config: LlamaConfig) -> Array | None:
    """Return the prefix as an array.

    Raises:
        ValueError: another batch size, N or more tokens, or a token out of the codebook.
    """
    if prefix is None:
        return None
    prefix = prefix if isinstance(prefix, Array) else np.asarray(prefix)
    if prefix.size:
        check_integers("prefix", prefix, "tokens")
    check_shape("prefix", prefix, (batch_size, "K"))
    if prefix.shape[1] >= config.num_tokens:
        raise ValueError(
            f"prefix holds {prefix.shape[1]} tokens, expected fewer than {config.num_tokens}"
        )
    check_range("prefix", prefix, config.vocab_size)
    return jnp.asarray(prefix, jnp.int32)


def check_indices(indices: Any, config: TokenizerConfig, num_groups: int) -> None:
    """Check [B, n] with the tokens of the groups, and the codebook; or codes [B, n, C] without one.

    Raises:
        ValueError: another shape, too few or too many tokens, or one out of the codebook.
    """
    of_code = () if config.codebook_size else (config.code_dim,)
    check_shape("indices" if config.codebook_size else "codes", indices, ("B", "n", *of_code))
    if config.codebook_size:
        check_integers("indices", indices, "tokens")
    needed = config.num_tokens * num_groups // config.num_groups
    if not needed <= indices.shape[1] <= config.num_tokens:
        raise ValueError(
            f"indices hold {indices.shape[1]} tokens, expected {needed} to {config.num_tokens}"
        )
    if config.codebook_size:
        check_range("indices", indices, config.codebook_size)


def check_steps(config: TokenizerConfig, num_steps: int, num_groups: int, start_step: int) -> int:
    """Return the number of steps that the groups suffice for.

    Raises:
        ValueError: no such steps or groups, or none left to take.
    """
    check_num_steps(num_steps)
    check_number("num_groups", num_groups, numbers.Integral)
    check_number("start_step", start_step, numbers.Integral)
    stop_step = sampler.steps_of_groups(config, num_steps, num_groups)
    last = num_steps if stop_step == num_steps else stop_step - 1
    if not 0 <= start_step <= last:
        raise ValueError(f"start_step={start_step} must be in 0..{last}")
    return stop_step


def check_start_image(image: Any, shape: tuple[int, ...], start_step: int) -> Any:
    """Return images that a run starts from as floats in [-1, 1], if there are any.

    Raises:
        ValueError: another shape or type, or a run from the first step, which starts from noise.
    """
    if image is None:
        return None
    check_shape("start_image", image, shape)
    image = as_image("start_image", image)
    if not start_step:
        raise ValueError("start_step=0 starts from noise: leave start_image out, or set it")
    return image


def check_known(known: Any, mask: Any, shape: tuple[int, ...]) -> sampler.Known | None:
    """Return known images and the mask of their known pixels, if there are any.

    Args:
        known: images [B, H, W, 3] in [-1, 1].
        mask: [B, H, W] or [H, W]: True (or 1) where a pixel is known.
        shape: (B, H, W) of the images that are made.

    Raises:
        ValueError: one without the other, or of another shape, or a mask with other values.
    """
    if known is None and mask is None:
        return None
    if known is None or mask is None:
        raise ValueError("in-painting needs both known= (images) and mask= (1 where known)")
    known = as_image("known", known)
    check_shape("known", known, (*shape, 3))
    mask = np.asarray(mask)
    check_shape("mask", mask, shape if mask.ndim == len(shape) else shape[1:])
    if not np.isin(mask, (0, 1)).all():
        raise ValueError("mask must hold 0 (unknown) and 1 (known) only: compare it to a threshold")
    return sampler.Known(known, np.broadcast_to(mask, shape).astype(bool))
