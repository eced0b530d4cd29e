"""Work of the D-AR models, from their configs alone: FLOPs per image, bytes per step.

One multiply-add is 2 FLOPs. Matrix products and attention are counted, nothing else (norms,
activations and softmax are below 1 % at the released sizes). Causal attention is counted at what
it needs, S (S + 1) / 2 pairs of S tokens; the encoder's, whose patches see each other, at all S^2.

    linear layer [in, out] on R rows      2 R in out
    attention over P (query, key) pairs   4 P width       scores and weighted sum of the values
    training                              3 x forward     the backward pass has two products for one

A figure counts what the model asks for, not what a program does: recomputed blocks
(rematerialisation), padded caches and repeated condition passes are no work.
"""

from collections.abc import Sequence

from dar_jax.common.image import RGB
from dar_jax.models.dar.decoder import FEATURE_GRID, NUM_MODULATIONS, FlowDecoderConfig
from dar_jax.models.dar.llama import LlamaConfig
from dar_jax.models.dar.tokenizer import TokenizerConfig
from dar_jax.nn.transformer import MLP_RATIO

TRAINING_FORWARDS = 3
ATTENTION_PROJECTIONS = 4
"""Queries, keys, values and output."""


def causal_pairs(length: int) -> int:
    """Number of (query, key) pairs of `length` causal tokens."""
    return length * (length + 1) // 2


def linear_flops(rows: int, *widths: int) -> int:
    """FLOPs of a chain of linear layers of these widths on `rows` rows."""
    return 2 * rows * sum(a * b for a, b in zip(widths, widths[1:], strict=False))


def attention_flops(pairs: int, width: int) -> int:
    """FLOPs of all heads together, `width` channels, without the projections."""
    return 4 * pairs * width


def prior_forward_flops(config: LlamaConfig) -> int:
    """FLOPs of one sequence: T + N - 1 tokens through the blocks, N through the output layer.

    The last token predicts nothing, the first T - 1 condition tokens have no logits. One
    teacher-forced pass and token-by-token decoding with a cache do the same work.
    """
    length = config.condition_tokens + config.num_tokens - 1
    blocks = 2 * length * _block_weights(config) + attention_flops(causal_pairs(length), config.dim)
    flops = config.num_layers * blocks
    flops += linear_flops(config.num_tokens, config.dim, config.vocab_size)
    if config.caption_dim is not None:
        flops += linear_flops(config.condition_tokens, config.caption_dim, config.dim, config.dim)
    return flops


def prior_sampling_flops(config: LlamaConfig, guided: bool = True) -> int:
    """FLOPs to draw the tokens of one image; guidance doubles them."""
    return prior_forward_flops(config) * (2 if guided else 1)


def prior_train_flops(config: LlamaConfig) -> int:
    """FLOPs of one training image whose tokens are given; see `encode_flops` if they are not."""
    return TRAINING_FORWARDS * prior_forward_flops(config)


def prior_weight_bytes(config: LlamaConfig, itemsize: int = 2) -> int:
    """Bytes of the parameters that every decoding step reads: blocks, norms and output layer.

    Of the embedding tables a step reads one row per sequence; they are left out.
    """
    norms = (2 * config.num_layers + 1) * config.dim
    output = config.dim * config.vocab_size
    return itemsize * (config.num_layers * _block_weights(config) + norms + output)


def kv_cache_bytes(config: LlamaConfig, length: int | None = None, itemsize: int = 2) -> int:
    """Bytes of the keys and values of one sequence (guidance holds two per image).

    Args:
        config: the prior's.
        length: cached tokens; None is the whole sequence, T + N.
        itemsize: bytes of a cached number.
    """
    length = config.condition_tokens + config.num_tokens if length is None else length
    return itemsize * 2 * config.num_layers * _kv_width(config) * length


def prior_sampling_bytes(
    config: LlamaConfig, boundaries: Sequence[int], *, num_rows: int, itemsize: int = 2
) -> int:
    """Bytes read to draw all tokens of `num_rows` sequences: per token the weights and the caches.

    Args:
        config: the prior's.
        boundaries: numbers of tokens after each group; decoding attends to as many slots as the
            last token of a group needs, and the last boundary ends it.
        num_rows: sequences; twice the images if guided.
        itemsize: bytes of a weight and of a cached number.
    """
    total = start = 0
    for stop in boundaries:
        cache = kv_cache_bytes(config, config.condition_tokens + stop - 1, itemsize)
        total += (stop - start) * (prior_weight_bytes(config, itemsize) + num_rows * cache)
        start = stop
    return total


def encode_flops(config: TokenizerConfig) -> int:
    """FLOPs from one image to its indices."""
    encoder, num_tokens = config.encoder, config.num_tokens
    num_patches = (config.image_size // encoder.patch_size) ** 2
    length = num_patches + num_tokens
    flops = linear_flops(num_patches, RGB * encoder.patch_size**2, encoder.dim)
    flops += encoder.depth * _transformer_block_flops(length, length**2, encoder.dim)
    # To a code, and its products with the codebook.
    return flops + linear_flops(num_tokens, encoder.dim, config.code_dim, config.codebook_size)


def condition_flops(config: TokenizerConfig) -> int:
    """FLOPs from the codes of one image to its condition tokens, once per image."""
    condition, length = config.condition, config.num_tokens
    flops = linear_flops(length, config.code_dim, condition.dim)
    block = _transformer_block_flops(length, causal_pairs(length), condition.dim)
    return flops + condition.depth * block


def flow_step_flops(config: TokenizerConfig) -> int:
    """FLOPs of one velocity of one image, given its window of condition tokens."""
    decoder, window, dim = config.decoder, config.window, config.decoder.dim
    num_patches = (config.image_size // decoder.patch_size) ** 2
    pixels = RGB * decoder.patch_size**2
    flops = linear_flops(num_patches, pixels, dim) + linear_flops(num_patches, dim, pixels)
    flops += linear_flops(window, config.condition.dim, dim)
    if decoder.shared_time:
        flops += linear_flops(1, dim, dim, dim)
    if decoder.modulated_head:
        flops += linear_flops(1, dim, 2 * dim)
    return flops + decoder.depth * _flow_block_flops(decoder, num_patches, window)


def decode_flops(config: TokenizerConfig) -> int:
    """FLOPs from the indices of one image to the image, in the model's number of steps."""
    return condition_flops(config) + config.num_steps * flow_step_flops(config)


def tokenizer_train_flops(config: TokenizerConfig) -> int:
    """FLOPs of one training image in the tokenizer itself, without frozen nets of the loss."""
    forward = encode_flops(config) + condition_flops(config) + flow_step_flops(config)
    return TRAINING_FORWARDS * (forward + _alignment_flops(config))


def _block_weights(config: LlamaConfig) -> int:
    """Weights of the matrices of one Llama block."""
    attention = 2 * config.dim * (config.dim + _kv_width(config))
    return attention + 3 * config.dim * config.ffn_dim


def _kv_width(config: LlamaConfig) -> int:
    return (config.num_kv_heads or config.num_heads) * config.head_dim


def _transformer_block_flops(length: int, pairs: int, dim: int) -> int:
    """A block of the encoder or the condition layers."""
    projections = ATTENTION_PROJECTIONS * linear_flops(length, dim, dim)
    mlp = linear_flops(length, dim, MLP_RATIO * dim, dim)
    return projections + attention_flops(pairs, dim) + mlp


def _flow_block_flops(decoder: FlowDecoderConfig, num_patches: int, window: int) -> int:
    dim = decoder.dim
    flops = _transformer_block_flops(num_patches, num_patches**2, dim)
    flops += linear_flops(num_patches, dim, NUM_MODULATIONS * dim)
    # Condition: its MLP, its keys and values; queries and output of the cross-attention.
    flops += 2 * linear_flops(window, dim, dim, dim)
    flops += linear_flops(num_patches, dim, dim, dim) + attention_flops(num_patches * window, dim)
    return flops + (0 if decoder.shared_time else linear_flops(1, dim, dim, dim))


def _alignment_flops(config: TokenizerConfig) -> int:
    """The alignment head on its pooled grid, 0 if the model gives no features."""
    decoder = config.decoder
    if not decoder.gives_features:
        return 0
    rows = config.image_size // decoder.patch_size
    pooled = (rows // (rows // FEATURE_GRID)) ** 2
    hidden = decoder.feature_hidden_dim
    return linear_flops(pooled, decoder.dim, hidden, hidden, decoder.feature_dim)
