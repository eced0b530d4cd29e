"""Work of TransDiff, from its config alone; see `models.dar.work` for what counts.

The encoder's blocks are counted at the pairs that their mask allows, the decoder's cross-attention
at the condition tokens of each image. With guidance everything runs twice. Keys and values of the
condition are made once per pass, not once per step.
"""

from dar_jax.models.dar.work import (
    ATTENTION_PROJECTIONS,
    TRAINING_FORWARDS,
    attention_flops,
    linear_flops,
)
from dar_jax.models.transdiff.decoder import NUM_MODULATIONS, TIME_FEATURES
from dar_jax.models.transdiff.model import TransDiffConfig
from dar_jax.nn.transformer import MLP_RATIO


def encode_flops(config: TransDiffConfig, num_references: int) -> int:
    """FLOPs from a class and its first references to their condition tokens."""
    blocks = [config.buffer_size, *[config.tokens_per_image] * (1 + num_references)]
    length = sum(blocks)
    pairs = length**2
    if config.num_references > 1:
        pairs = sum(size * sum(blocks[: i + 1]) for i, size in enumerate(blocks))
    block = _block_flops(length, pairs, config.dim)
    patches = config.channels * config.reference_patch_size**2
    rows = num_references * config.tokens_per_image
    return config.encoder_depth * block + linear_flops(rows, patches, config.dim)


def keys_values_flops(config: TransDiffConfig, num_tokens: int) -> int:
    """FLOPs from condition tokens to what the decoder reads of them."""
    dim = config.dim
    projection = linear_flops(num_tokens, dim, dim)
    return projection + config.decoder_depth * 2 * linear_flops(num_tokens, dim, dim)


def step_flops(config: TransDiffConfig, num_condition_tokens: int) -> int:
    """FLOPs of one velocity of one image, given the keys and values of its condition."""
    dim, num_tokens = config.dim, config.latent_size**2
    cross = 2 * linear_flops(num_tokens, dim, dim)
    cross += attention_flops(num_tokens * num_condition_tokens, dim)
    blocks = config.decoder_depth * (_block_flops(num_tokens, num_tokens**2, dim) + cross)
    time = linear_flops(1, TIME_FEATURES, dim, dim) + linear_flops(1, dim, NUM_MODULATIONS * dim)
    return blocks + time + 2 * linear_flops(num_tokens, config.channels, dim)


def encode_bytes(config: TransDiffConfig, itemsize: int = 2) -> int:
    """Bytes of the matrices that one batch of conditions, with their keys and values, reads."""
    block = (ATTENTION_PROJECTIONS + 2 * MLP_RATIO) * config.dim**2
    keys_values = (1 + 2 * config.decoder_depth) * config.dim**2
    return itemsize * (config.encoder_depth * block + keys_values)


def step_bytes(
    config: TransDiffConfig, num_condition_tokens: int, *, num_rows: int, itemsize: int = 2
) -> int:
    """Bytes that one velocity of `num_rows` rows reads: matrices, and the rows' keys and values.

    Keys and values of the condition are there already, see `encode_bytes`.
    """
    dim = config.dim
    block = (ATTENTION_PROJECTIONS + 2 + 2 * MLP_RATIO) * dim**2
    time = TIME_FEATURES * dim + dim**2 + NUM_MODULATIONS * dim**2
    weights = config.decoder_depth * block + time + 2 * config.channels * dim
    return itemsize * weights + num_rows * cache_bytes(config, num_condition_tokens, itemsize)


def cache_bytes(config: TransDiffConfig, num_condition_tokens: int, itemsize: int = 2) -> int:
    """Bytes of the keys and values of one condition (guidance has two per image)."""
    return itemsize * 2 * config.decoder_depth * num_condition_tokens * config.dim


def sampling_flops(config: TransDiffConfig, num_steps: int = 100, guided: bool = True) -> int:
    """FLOPs to draw the latent of one image, all passes of an MRAR model included."""
    flops = 0
    for references in range(config.num_references):
        tokens = (1 + references) * config.tokens_per_image
        flops += encode_flops(config, references) + keys_values_flops(config, tokens)
        flops += num_steps * step_flops(config, tokens)
    return flops * (2 if guided else 1)


def train_flops(config: TransDiffConfig, copies: int) -> int:
    """FLOPs of one training sample: an image, or as many of one class as an MRAR model takes.

    Args:
        config: the model's.
        copies: noisy copies of every image that one pass of the encoder serves.
    """
    flops = encode_flops(config, config.num_references - 1)
    flops += keys_values_flops(config, config.condition_tokens)
    for references in range(config.num_references):
        flops += copies * step_flops(config, (1 + references) * config.tokens_per_image)
    return TRAINING_FORWARDS * flops


def _block_flops(length: int, pairs: int, dim: int) -> int:
    """Self-attention and MLP."""
    projections = ATTENTION_PROJECTIONS * linear_flops(length, dim, dim)
    mlp = linear_flops(length, dim, MLP_RATIO * dim, dim)
    return projections + attention_flops(pairs, dim) + mlp
