"""KV-cached decoding in groups.

A cache is any tree of arrays whose axis `SLOT_AXIS` counts the slots. Large caches grow from group
to group, each a compiled program that attends a prefix of static length: half the bytes that one
padded cache would have it read. Small ones have all slots from the beginning, and all groups share
one program.

With guidance every image has two rows, the conditional and the unconditional one, side by side so
that a batch split over devices keeps them together; both get the same tokens. Image i draws token n
with `fold_in(rngs[i], n)`: a sample depends on its own key only, not on the batch it is in.

Since what is random about a token is fixed by its image and position, tokens may be guessed: with
look-ahead a call draws several, of which those with right guesses before them are kept. This is
Jacobi decoding (Santilli et al. 2023, arXiv:2305.10427) with the noise held fixed. What is drawn is
the same, but for ties that products of another shape round the other way.
"""

import dataclasses
import functools
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple, Protocol, TypeVar

import einops
import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.common.compiled import call
from dar_jax.common.tree import tree_bytes
from dar_jax.common.typing import Any, Array, Float, Int, Params, PRNGKeys
from dar_jax.sampling.logits import SamplingConfig, guide, sample_token

SLOT_AXIS = 2
SMALL_CACHES = 2**25
"""Bytes of caches that fit beside the compute units, where reading all of them costs little."""
SMALL_SHARE = 0.1
"""Likewise, as a share of the weights, which are read with them."""


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


class AheadState(NamedTuple):
    """Between two groups, with look-ahead.

    Attributes:
        tokens: int32 [B, N + window - 1], those that are known and then guesses.
        known: how many are, int32 [B].
        calls: how many it has taken, int32 [B].
        caches: filled so far; 2B rows if guided.
        key_mask: see `DecodingState`.
    """

    tokens: Array
    known: Array
    calls: Array
    caches: Any
    key_mask: Array | None


State = TypeVar("State", DecodingState, AheadState)
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


@functools.partial(jax.jit, static_argnames="window")
def start_ahead(
    state: DecodingState, num_known: Int[Array, ""] | int, *, window: int
) -> AheadState:
    """Begin look-ahead behind the known tokens; all guesses are token 0."""
    tokens = jnp.pad(state.tokens, ((0, 0), (0, window - 1)))
    known = jnp.full(len(tokens), num_known, jnp.int32)
    return AheadState(tokens, known, jnp.zeros_like(known), state.caches, state.key_mask)


@functools.partial(jax.jit, static_argnames=("window", "num_slots"))
def decode_ahead(
    decoder: TokenDecoder,
    params: Params,
    state: AheadState,
    rngs: PRNGKeys,
    scales: Float[Array, " N"],
    *,
    stop: int | Int[Array, ""],
    window: int,
    num_slots: int,
) -> AheadState:
    """Draw until the tokens before `stop` are known, of every image, `window` in a call.

    A token is a function of those before it. A call runs the last known one and the guesses behind
    it, and draws the token after each: the first is right, and so is any other as long as the
    guesses before it are what is drawn there. Those behind are the next guesses.

    A wrong guess leaves keys and values in slots that nobody attends to before they are written
    again. The caches are grown once, to `num_slots`, T + stop + window - 2 or more.
    """
    module = decoder.model.bind(params)
    state = state._replace(caches=grow(state.caches, num_slots))
    offsets = jnp.arange(window)

    def body(state: AheadState) -> AheadState:
        first = jnp.minimum(state.known, stop - 1)  # an image that is done draws its last ones anew
        index = first[:, None] + offsets
        inputs = jnp.take_along_axis(state.tokens, index - 1, axis=1)
        position = decoder.num_condition + first - 1
        # One image needs no scatter into its caches.
        position = position[0] if len(position) == 1 else decoder.rows(position)
        x = tell_scales(module, module.token_embed(decoder.rows(inputs)), scales[index])
        x, caches = module.extend(x, state.caches, position, state.key_mask)
        logits = module.head(x)
        drawn = jax.vmap(decoder.draw, (None, 1, 1, None), 1)(rngs, logits, index, scales)
        right = jnp.cumprod(inputs[:, 1:] == drawn[:, :-1], axis=1).sum(axis=1, dtype=jnp.int32)
        drawn = jnp.where(
            index < state.known[:, None], jnp.take_along_axis(state.tokens, index, axis=1), drawn
        )
        tokens = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))(
            state.tokens, drawn, first
        )
        return AheadState(
            tokens,
            jnp.maximum(state.known, first + 1 + right),
            state.calls + (state.known < stop),
            caches,
            state.key_mask,
        )

    return jax.lax.while_loop(lambda state: jnp.any(state.known < stop), body, state)


def generate(
    decoder: TokenDecoder,
    params: Params,
    condition: Float[Array, "R T D"] | jax.ShapeDtypeStruct,
    prefix: Int[Array, "B K"],
    rngs: PRNGKeys,
    scales: Float[np.ndarray, " N"],
    *,
    boundaries: Sequence[int],
    key_mask: Array | None = None,
    window: int = 0,
    attends_filled: bool = False,
    run: Callable[..., Any] = call,
) -> Generator[Int[Array, "B n"], Int[Array, "B n"] | None, None]:
    """Yield all tokens so far, the prefix included, whenever a group is complete.

    What is sent back, if anything, says which rows to go on with; see `take`. Nothing waits for the
    device: the next group can be dispatched while the last one is used.

    Args:
        decoder: fixed part of the decoding.
        params: parameters of the model, unstacked.
        condition: embedded condition tokens of all rows, or their shape if `run` records.
        prefix: given image tokens, K < N.
        rngs: one key per image.
        scales: guidance scale of every image token. Where no later one differs from 1, a group is
            decoded without unconditional rows.
        boundaries: increasing numbers of tokens after which to yield; the last one ends.
        key_mask: see `DecodingState`.
        window: tokens that a call of look-ahead draws; 0 is none.
        attends_filled: slots that are not filled are not read, so that caches need not grow.
        run: calls jitted functions, or records them; see `common.compiled`.
    """
    device_scales = jnp.asarray(scales)
    start, beyond = prefix.shape[1] + 1, decoder.num_condition - 1 + max(window - 1, 0)
    all_slots = beyond + len(scales)
    grows = not attends_filled and _are_large(decoder.model, params, len(condition) * all_slots)
    least_slots = 0 if grows else all_slots
    num_slots = max(decoder.num_condition - 1 + start, least_slots)
    inputs = (decoder, params, condition, prefix, rngs, device_scales, key_mask)
    state: Any = run(prefill, *inputs, num_slots=num_slots)
    if window:
        state = run(start_ahead, state, start, window=window)
    for stop in boundaries:
        if decoder.guided and np.all(scales[start:] == 1):
            decoder = dataclasses.replace(decoder, guided=False)
            state = run(without_unconditional, state)
        if stop > start:
            fixed = (decoder, params, state, rngs, device_scales)
            ends = dict(stop=stop, num_slots=max(beyond + stop, least_slots))
            if window:
                state = run(decode_ahead, *fixed, window=window, **ends)
            else:
                state = run(decode, *fixed, start=start, **ends)
            start = stop
        parents = yield run(tokens_between, state.tokens, start=0, stop=stop)
        if parents is not None:
            state = take(state, parents)
            if isinstance(state, AheadState):  # beyond, tokens are the parent's draws
                state = state._replace(known=jnp.minimum(state.known, stop))


def _are_large(model: Any, params: Params, num_slots: int) -> bool:
    """Whether caches of so many slots in all are so large that they had better grow."""
    num_bytes = num_slots * slot_bytes(model)
    return num_bytes > max(SMALL_CACHES, SMALL_SHARE * tree_bytes(params))


@jax.jit
def without_unconditional(state: State) -> State:
    """Drop the unconditional rows."""
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
