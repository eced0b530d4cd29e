"""Condition tokens that grow with the sequence.

The layers that make them are causal: with their keys and values kept, each group of tokens runs
through them once, for all steps of the flow decoder.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from dar_jax.common.typing import Array, Int, Params, PRNGKeys
from dar_jax.models.dar.tokenizer import Tokenizer
from dar_jax.nn.attention import KVCache
from dar_jax.nn.functional_model import FunctionalModel


class KnownCondition(NamedTuple):
    """Of the first tokens of every row.

    Attributes:
        tokens: condition tokens, float32 [B, N, D], those that are known and then zeros.
        caches: of the causal layers, [B, depth, heads, N, head_dim].
    """

    tokens: Array
    caches: KVCache


def start(model: FunctionalModel[Tokenizer], rngs: PRNGKeys) -> KnownCondition:
    """No tokens are known yet, of as many rows as there are keys, which say where they are."""
    config = model.config
    layers, num_tokens = config.condition, config.num_tokens
    # What is put on a single device is committed to it, another case for compiled programs. While a
    # program is traced, it is the compiler that says.
    where = getattr(rngs, "sharding", None)
    device = None if isinstance(where, SingleDeviceSharding) else where
    heads = layers.dim // layers.head_dim
    shape = (len(rngs), layers.depth, heads, num_tokens, layers.head_dim)
    tokens = jnp.zeros((len(rngs), num_tokens, layers.dim), device=device)
    cache = jnp.zeros(shape, model.compute.jnp_dtype, device=device)
    return KnownCondition(tokens, KVCache(cache, cache))


@functools.partial(jax.jit, static_argnames="model")
def extend(
    model: FunctionalModel[Tokenizer],
    params: Params,
    indices: Int[Array, "B n"],
    known: KnownCondition,
    position: Int[Array, ""] | int,
) -> KnownCondition:
    """Add the condition tokens of n indices from `position` on; those before are known."""
    with model.decoding(params) as tokenizer:
        codes = tokenizer.codes(indices)
        new, caches = tokenizer.condition_layers.extend(codes, known.caches, position)
    tokens = jax.lax.dynamic_update_slice_in_dim(known.tokens, new, position, axis=1)
    return KnownCondition(tokens, caches)
