"""Prompts for the D-AR prior: texts to the features that it is conditioned on."""

from collections.abc import Sequence

import numpy as np

from dar_jax.common.typing import Any
from dar_jax.models.dar.llama import LlamaConfig
from dar_jax.models.text.encoder import TextEncoder, open_encoder


def open_encoder_of(config: LlamaConfig) -> TextEncoder:
    """Open the text encoder of a prior.

    Raises:
        ValueError: the prior names none, there is no such one, or it is another one than the prior
            was trained with.
    """
    if not config.text_encoder:
        raise ValueError(
            "the model names no text encoder (config.model.text_encoder, such as minilm or t5): it "
            "takes features of captions, no texts"
        )
    encoder = open_encoder(config.text_encoder, config.condition_tokens)
    if encoder.dim != config.caption_dim:
        raise ValueError(
            f"the text encoder {config.text_encoder!r} makes {encoder.dim} features of a token, "
            f"but config.model.caption_dim={config.caption_dim}; use that number"
        )
    if config.text_digest not in ("", encoder.digest):
        raise ValueError(
            f"the text encoder {config.text_encoder!r} in {encoder.directory} is another one than "
            "the model was trained with: install or name that one"
        )
    return encoder


def are_texts(labels: Any) -> bool:
    """Tell whether a text, or several, stand for labels."""
    if isinstance(labels, np.ndarray):
        return labels.dtype.kind == "U"
    several = isinstance(labels, Sequence) and len(labels) > 0
    return isinstance(labels, str) or (several and all(isinstance(text, str) for text in labels))


def encode_texts(config: LlamaConfig, labels: Any, mask: Any) -> tuple[Any, Any]:
    """Return features of captions and where they have tokens, if texts are given for them.

    Args:
        config: of the prior.
        labels: texts; all else is returned as it is, as are texts for a prior of classes: names.
        mask: likewise, for what is no text.

    Raises:
        ValueError: see `open_encoder_of`; or there are texts and a mask.
    """
    if config.caption_dim is None or not are_texts(labels):
        return labels, mask
    if mask is not None:
        raise ValueError("caption_mask is for features of captions: leave it out for texts")
    texts = [labels] if isinstance(labels, str) else list(map(str, labels))
    return open_encoder_of(config).encode(texts)
