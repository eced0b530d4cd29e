"""KV-cached decoding: the condition and known tokens at once, then token by token.

A cache is any tree of arrays whose axis `SLOT_AXIS` counts the slots. `sampling.groups` decodes an
image in groups of tokens with it, `sampling.lookahead` several tokens in a call.

With guidance every image has two rows, the conditional and the unconditional one, side by side so
that a batch split over devices keeps them together; both get the same tokens. Image i draws token n
with `fold_in(rngs[i], n)`: a sample depends on its own key only, not on the batch it is in.
"""

import dataclasses
import functools
from typing import NamedTuple, Protocol

import einops
import jax
import jax.numpy as jnp

from dar_jax.common.tree import tree_bytes
from dar_jax.common.typing import Any, Array, Float, Int, Params, PRNGKeys
from dar_jax.sampling.logits import SamplingConfig, guide, sample_token

SLOT_AXIS = 2


class DecodableModel(Protocol):
    """Hashable; `bind(params)` gives a module with these methods, `init(rng)` its parameters."""

    def empty_caches(self, batch_size: int) -> Any:
        """Make caches of no slots for so many rows."""

    def token_embed(self, tokens: Array) -> Array:
        """Embed tokens [B, N]."""
        ...

    def extend(self, x: Array, caches: Any, position: Array, key_mask: Any) -> tuple[Array, Any]:
        """Run embedded tokens on top of caches; return what `head` takes, and the caches."""
        ...

    def head(self, hidden: Array) -> Array:
        """Return the logits."""
        ...


class DecodingState(NamedTuple):
    """Between two groups.

    Attributes:
        tokens: int32 [B, N], those that are known and then zeros.
        caches: filled so far; 2B rows if guided.
        key_mask: bool [rows, all slots], False for slots that nobody attends to; or None.
    """

    tokens: Array
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
        guided: every image has a conditional and an unconditional row. Models that take scales as
            an input (`guidance_embed`) have none.
    """

    model: Any = dataclasses.field(metadata=STATIC)
    num_condition: int = dataclasses.field(metadata=STATIC)
    sampling: SamplingConfig
    guided: bool = dataclasses.field(metadata=STATIC)

    def draw(
        self,
        rngs: PRNGKeys,
        logits: Float[Array, "R V"],
        index: Int[Array, ""] | Int[Array, " B"] | int,
        scales: Float[Array, " N"],
    ) -> Int[Array, " B"]:
        """Draw image token `index`, one for all images or one of each, from the rows' logits."""
        index = jnp.broadcast_to(index, rngs.shape[:1])
        if self.guided:
            conditional, unconditional = einops.rearrange(logits, "(b two) v -> two b v", two=2)
            logits = guide(conditional, unconditional, scales[index][:, None])
        return sample_token(jax.vmap(jax.random.fold_in)(rngs, index), logits, self.sampling)

    def rows(self, tokens: Array) -> Array:
        """Repeat what an image has for both of its rows."""
        return jnp.repeat(tokens, 2, axis=0) if self.guided else tokens


class Conditioned(NamedTuple):
    """A model and what it draws for.

    Attributes:
        decoder: fixed part of the decoding.
        params: parameters of the model, unstacked.
        condition: embedded condition tokens of all rows, [rows, T, D], or their shape.
        key_mask: see `DecodingState`.
    """

    decoder: TokenDecoder
    params: Params
    condition: Any
    key_mask: Array | None


def tell_scales(module: Any, x: Float[Array, "R M D"], scales: Array) -> Float[Array, "R M D"]:
    """Add to the last inputs the guidance scales of the tokens that they predict, if it asks."""
    if not hasattr(module, "guidance_embed"):
        return x
    embedded = module.guidance_embed(jnp.atleast_1d(scales))
    return x.at[:, -embedded.shape[-2] :].add(embedded)


@functools.partial(jax.jit, static_argnames="num_slots")
def prefill(
    decoder: TokenDecoder,
    params: Params,
    condition: Float[Array, "R T D"],
    prefix: Int[Array, "B K"],
    rngs: PRNGKeys,
    scales: Float[Array, " N"],
    key_mask: Array | None = None,
    *,
    num_slots: int,
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
        num_slots: of the caches, T + K or more.
    """
    module = decoder.model.bind(params)
    x = condition
    if prefix.shape[1]:
        x = jnp.concatenate([x, module.token_embed(decoder.rows(prefix))], axis=1)
    x = tell_scales(module, x, scales[: prefix.shape[1] + 1])
    caches = grow(module.empty_caches(len(x)), num_slots)
    x, caches = module.extend(x, caches, 0, key_mask)
    token = decoder.draw(rngs, module.head(x[:, -1]), prefix.shape[1], scales)
    tokens = jnp.concatenate([prefix, token[:, None]], axis=1)
    tokens = jnp.pad(tokens, ((0, 0), (0, len(scales) - tokens.shape[1])))
    return DecodingState(tokens, caches, key_mask)


@functools.partial(jax.jit, static_argnames="num_slots")
def decode(
    decoder: TokenDecoder,
    params: Params,
    state: DecodingState,
    rngs: PRNGKeys,
    scales: Float[Array, " N"],
    *,
    start: int | Int[Array, ""],
    stop: int | Int[Array, ""],
    num_slots: int,
) -> DecodingState:
    """Draw the image tokens start .. stop - 1; those before are known.

    The caches are grown once, to `num_slots`, T + stop - 1 or more.
    """
    module = decoder.model.bind(params)
    state = state._replace(caches=grow(state.caches, num_slots))

    def body(index: Array, state: DecodingState) -> DecodingState:
        last = jax.lax.dynamic_slice_in_dim(state.tokens, index - 1, 1, axis=1)
        position = decoder.num_condition + index - 1
        x = tell_scales(module, module.token_embed(decoder.rows(last)), scales[index])
        x, caches = module.extend(x, state.caches, position, state.key_mask)
        token = decoder.draw(rngs, module.head(x[:, 0]), index, scales)
        tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], index, axis=1)
        return state._replace(tokens=tokens, caches=caches)

    return jax.lax.fori_loop(start, stop, body, state)


@jax.jit
def without_unconditional(state: Any) -> Any:
    """Drop the unconditional rows of a state: of its caches and its mask of keys."""
    caches, key_mask = jax.tree.map(lambda rows: rows[::2], (state.caches, state.key_mask))
    return state._replace(caches=caches, key_mask=key_mask)


@functools.partial(jax.jit, static_argnames=("start", "stop"))
def tokens_between(tokens: Int[Array, "B n"], *, start: int, stop: int) -> Int[Array, "B m"]:
    """Return the tokens start .. stop - 1."""
    return tokens[:, start:stop]


@functools.cache
def slot_bytes(model: Any) -> int:
    """Bytes of the keys and values of one token of one row."""

    def caches() -> Any:
        module = model.bind(model.init(jax.random.key(0)))
        return grow(module.empty_caches(1), 1)

    return tree_bytes(jax.eval_shape(caches))


@jax.jit
def take(tree: Any, parents: Int[Array, "B n"]) -> Any:
    """Gather arrays of n candidates for each of B images: candidate i becomes `parents[:, i]`.

    An array has its candidates' rows side by side: [B * n * rows of a candidate, ...].
    """

    def gather(rows: Array) -> Array:
        candidates = rows.reshape(*parents.shape, len(rows) // parents.size, *rows.shape[1:])
        return jax.vmap(lambda own, chosen: own[chosen])(candidates, parents).reshape(rows.shape)

    return jax.tree.map(gather, tree)


def grow(caches: Any, num_slots: int) -> Any:
    """Zero-pad every cache to `num_slots` slots."""

    def pad(cache: Array) -> Array:
        widths = [(0, 0)] * cache.ndim
        widths[SLOT_AXIS] = (0, num_slots - cache.shape[SLOT_AXIS])
        return jnp.pad(cache, widths)

    return jax.tree.map(pad, caches)
