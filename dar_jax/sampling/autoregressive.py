"""KV-cached decoding in groups: one compiled program per group, its caches just long enough.

A cache is any tree of arrays whose axis `SLOT_AXIS` counts the slots. Attending a prefix of static
length per group instead of one padded cache halves the bytes that decoding reads.

With guidance every image has two rows, the conditional and the unconditional one, side by side so
that a batch split over devices keeps them together; both get the same tokens. Image i draws token n
with `fold_in(rngs[i], n)`: a sample depends on its own key only, not on the batch it is in.
"""

import dataclasses
import functools
from collections.abc import Generator, Sequence
from typing import NamedTuple, Protocol

import einops
import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.common.typing import Any, Array, Float, Int, Params, PRNGKeys
from dar_jax.sampling.logits import SamplingConfig, guide, sample_token

SLOT_AXIS = 2


class DecodableModel(Protocol):
    """Hashable; `bind(params)` gives a module with these methods."""

    def empty_caches(self, batch_size: int) -> Any:
        """Make caches of no slots for so many rows."""

    def token_embed(self, tokens: Array) -> Array:
        """Embed tokens [B, N]."""
        ...

    def extend(self, x: Array, caches: Any, position: Array, key_mask: Any) -> tuple[Array, Any]:
        """Run embedded tokens on top of caches; return the last one's logits, and the caches."""
        ...


class DecodingState(NamedTuple):
    """Between two groups.

    Attributes:
        token: the last drawn token, int32 [B].
        caches: filled so far; 2B rows if guided.
        key_mask: bool [rows, all slots], False for slots that nobody attends to; or None.
    """

    token: Array
    caches: Any
    key_mask: Array | None


STATIC = {"static": True}
"""Marks fields that are no part of the tree."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenDecoder:
    """What stays fixed while decoding: a tree whose only leaf is the temperature of `sampling`.

    Attributes:
        model: see `DecodableModel`.
        num_condition: condition tokens T in front of the image tokens.
        sampling: how tokens are drawn.
        guided: every image has a conditional and an unconditional row.
    """

    model: Any = dataclasses.field(metadata=STATIC)
    num_condition: int = dataclasses.field(metadata=STATIC)
    sampling: SamplingConfig
    guided: bool = dataclasses.field(metadata=STATIC)

    def draw(
        self, rngs: PRNGKeys, logits: Float[Array, "R V"], index: Int[Array, ""] | int, scale: Array
    ) -> Int[Array, " B"]:
        """Draw image token `index` from the rows' logits."""
        if self.guided:
            conditional, unconditional = einops.rearrange(logits, "(b two) v -> two b v", two=2)
            logits = guide(conditional, unconditional, scale)
        rngs = jax.vmap(jax.random.fold_in, (0, None))(rngs, index)
        return sample_token(rngs, logits, self.sampling)

    def rows(self, tokens: Array) -> Array:
        """Repeat what an image has for both of its rows."""
        return jnp.repeat(tokens, 2, axis=0) if self.guided else tokens


@jax.jit
def prefill(
    decoder: TokenDecoder,
    params: Params,
    condition: Float[Array, "R T D"],
    prefix: Int[Array, "B K"],
    rngs: PRNGKeys,
    scales: Float[Array, " N"],
    key_mask: Array | None = None,
) -> DecodingState:
    """Run the condition and K given tokens, draw token K.

    Args:
        decoder: fixed part of the decoding.
        params: parameters of the model, unstacked.
        condition: embedded condition tokens of all rows.
        prefix: given image tokens; K may be 0.
        rngs: one key per image.
        scales: guidance scale of every image token.
        key_mask: see `DecodingState`.
    """
    module = decoder.model.bind(params)
    x = condition
    if prefix.shape[1]:
        x = jnp.concatenate([x, module.token_embed(decoder.rows(prefix))], axis=1)
    caches = grow(module.empty_caches(len(x)), x.shape[1])
    logits, caches = module.extend(x, caches, 0, key_mask)
    index = prefix.shape[1]
    return DecodingState(decoder.draw(rngs, logits, index, scales[index]), caches, key_mask)


@functools.partial(jax.jit, static_argnames=("start", "stop"))
def decode(
    decoder: TokenDecoder,
    params: Params,
    state: DecodingState,
    rngs: PRNGKeys,
    scales: Float[Array, " N"],
    *,
    start: int,
    stop: int,
) -> tuple[DecodingState, Int[Array, "B n"]]:
    """Draw the image tokens start .. stop - 1; `state` holds token start - 1.

    `start` and `stop` are static: the caches are grown once to exactly the slots that the last of
    these tokens attends to.
    """
    module = decoder.model.bind(params)
    state = state._replace(caches=grow(state.caches, decoder.num_condition + stop - 1))

    def body(state: DecodingState, index: Array) -> tuple[DecodingState, Array]:
        x = module.token_embed(decoder.rows(state.token)[:, None])
        position = decoder.num_condition + index - 1
        logits, caches = module.extend(x, state.caches, position, state.key_mask)
        token = decoder.draw(rngs, logits, index, scales[index])
        return DecodingState(token, caches, state.key_mask), token

    state, tokens = jax.lax.scan(body, state, jnp.arange(start, stop))
    return state, tokens.T


def generate(
    decoder: TokenDecoder,
    params: Params,
    condition: Float[Array, "R T D"],
    prefix: Int[Array, "B K"],
    rngs: PRNGKeys,
    scales: Float[np.ndarray, " N"],
    *,
    boundaries: Sequence[int],
    key_mask: Array | None = None,
) -> Generator[Int[Array, "B n"], Int[Array, "B n"] | None, None]:
    """Yield all tokens so far, the prefix included, whenever a group is complete.

    What is sent back, if anything, says which rows to go on with; see `take`. Nothing waits for the
    device: the next group can be dispatched while the last one is used.

    Args:
        decoder: fixed part of the decoding.
        params: parameters of the model, unstacked.
        condition: embedded condition tokens of all rows.
        prefix: given image tokens, K < N.
        rngs: one key per image.
        scales: guidance scale of every image token. Where no later one differs from 1, a group is
            decoded without unconditional rows.
        boundaries: increasing numbers of tokens after which to yield; the last one ends.
        key_mask: see `DecodingState`.
    """
    device_scales = jnp.asarray(scales)
    state = prefill(decoder, params, condition, prefix, rngs, device_scales, key_mask)
    tokens = jnp.concatenate([prefix, state.token[:, None]], axis=1)
    for stop in boundaries:
        start = tokens.shape[1]
        if decoder.guided and np.all(scales[start:] == 1):
            decoder, state = without_guidance(decoder, state)
        if stop > start:
            state, new = decode(decoder, params, state, rngs, device_scales, start=start, stop=stop)
            tokens = jnp.concatenate([tokens, new], axis=1)
        parents = yield tokens[:, :stop]
        if parents is not None:
            state, tokens = take((state, tokens), parents)


def without_guidance(
    decoder: TokenDecoder, state: DecodingState
) -> tuple[TokenDecoder, DecodingState]:
    """Drop the unconditional rows."""
    caches, key_mask = jax.tree.map(lambda rows: rows[::2], (state.caches, state.key_mask))
    return dataclasses.replace(decoder, guided=False), DecodingState(state.token, caches, key_mask)


@jax.jit
def take(tree: Any, parents: Int[Array, "B n"]) -> Any:
    """Gather arrays of n candidates for each of B images: candidate i becomes `parents[:, i]`.

    An array has its candidates' rows side by side: [B * n * rows of a candidate, ...].
    """

    def gather(rows: Array) -> Array:
        candidates = rows.reshape(*parents.shape, -1, *rows.shape[1:])
        return jax.vmap(lambda own, chosen: own[chosen])(candidates, parents).reshape(rows.shape)

    return jax.tree.map(gather, tree)


def grow(caches: Any, num_slots: int) -> Any:
    """Zero-pad every cache to `num_slots` slots."""

    def pad(cache: Array) -> Array:
        widths = [(0, 0)] * cache.ndim
        widths[SLOT_AXIS] = (0, num_slots - cache.shape[SLOT_AXIS])
        return jnp.pad(cache, widths)

    return jax.tree.map(pad, caches)
