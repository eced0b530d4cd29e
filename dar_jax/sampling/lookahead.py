"""Look-ahead: several tokens of an image in a call of the model.

What is random about a token is fixed by its image and position, so tokens may be guessed: a call
draws several of them, of which those with right guesses before them are kept. What is drawn is the
same, but for ties that products of another shape round the other way.

Guesses are what the call before has drawn behind its last right one: Jacobi decoding (Santilli et
al. 2023, arXiv:2305.10427) with the noise held fixed. Or a smaller model, the draft, draws them one
by one with the same noise: speculative decoding (Leviathan et al. 2023, arXiv:2211.17192), where a
guess is right if it is the token that is drawn, not with a probability.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dar_jax.common.typing import Any, Array, Float, Int, Params, PRNGKeys
from dar_jax.sampling import autoregressive
from dar_jax.sampling.autoregressive import DecodingState, TokenDecoder, tell_scales


class AheadState(NamedTuple):
    """Between two groups.

    Attributes:
        tokens: int32 [B, N + window - 1], those that are known and then guesses.
        known: how many are, int32 [B].
        calls: how many it has taken, int32 [B].
        caches: filled so far; 2B rows if guided.
        key_mask: see `DecodingState`.
        draft: caches and mask of the model that guesses; its tokens are of no interest.
    """

    tokens: Array
    known: Array
    calls: Array
    caches: Any
    key_mask: Array | None
    draft: DecodingState | None


@functools.partial(jax.jit, static_argnames="window")
def start_ahead(
    state: DecodingState,
    draft: DecodingState | None,
    num_known: Int[Array, ""] | int,
    *,
    window: int,
) -> AheadState:
    """Begin look-ahead behind the known tokens; all guesses are token 0."""
    tokens = jnp.pad(state.tokens, ((0, 0), (0, window - 1)))
    known = jnp.full(len(tokens), num_known, jnp.int32)
    return AheadState(tokens, known, jnp.zeros_like(known), state.caches, state.key_mask, draft)


@functools.partial(jax.jit, static_argnames=("window", "num_slots"))
def decode_ahead(
    decoder: TokenDecoder,
    params: Params,
    state: AheadState,
    rngs: PRNGKeys,
    scales: Float[Array, " N"],
    draft: tuple[TokenDecoder, Params] | None = None,
    *,
    stop: int | Int[Array, ""],
    window: int,
    num_slots: int,
) -> AheadState:
    """Draw until the tokens before `stop` are known, of every image, `window` in a call.

    A token is a function of those before it. A call runs the last known one and the guesses behind
    it, and draws the token after each: the first is right, and so is any other as long as the
    guesses before it are what is drawn there. Those behind are the next guesses, unless a draft
    makes others.

    A wrong guess leaves keys and values in slots that nobody attends to before they are written
    again. The caches are grown once, to `num_slots`, T + stop + window - 2 or more.
    """
    module = decoder.model.bind(params)
    state = _grow(state, num_slots)
    offsets = jnp.arange(window)

    def body(state: AheadState) -> AheadState:
        first = jnp.minimum(state.known, stop - 1)  # an image that is done draws its last ones anew
        if draft is not None:
            state = guess(*draft, state, rngs, scales, first=first, window=window)
        index = first[:, None] + offsets
        inputs = _at(state.tokens, index - 1)
        position = _of_rows(decoder, decoder.num_condition + first - 1)
        x = tell_scales(module, module.token_embed(decoder.rows(inputs)), scales[index])
        x, caches = module.extend(x, state.caches, position, state.key_mask)
        logits = module.head(x)
        drawn = jax.vmap(decoder.draw, (None, 1, 1, None), 1)(rngs, logits, index, scales)
        right = jnp.cumprod(inputs[:, 1:] == drawn[:, :-1], axis=1).sum(axis=1, dtype=jnp.int32)
        return state._replace(
            tokens=_put(state, first, drawn),
            known=jnp.maximum(state.known, first + 1 + right),
            calls=state.calls + (state.known < stop),
            caches=caches,
        )

    return jax.lax.while_loop(lambda state: jnp.any(state.known < stop), body, state)


def guess(
    decoder: TokenDecoder,
    params: Params,
    state: AheadState,
    rngs: PRNGKeys,
    scales: Float[Array, " N"],
    *,
    first: Int[Array, " B"],
    window: int,
) -> AheadState:
    """Let the draft draw the tokens first .. first + window - 2, but for those that are known.

    Its caches lack one token more than those of the model: the last guess of a window, which it has
    not run. So it begins with two tokens.
    """
    module = decoder.model.bind(params)

    def draw(
        state: AheadState, start: Int[Array, " B"], index: Int[Array, " B"], *, num_new: int
    ) -> AheadState:
        """Run the tokens from `start` on, and draw the token `index` behind one of them."""
        assert state.draft is not None
        numbers = start[:, None] + jnp.arange(num_new)
        x = module.token_embed(decoder.rows(_at(state.tokens, numbers)))
        x = tell_scales(module, x, scales[numbers + 1])
        position = _of_rows(decoder, decoder.num_condition + start)
        x, caches = module.extend(x, state.draft.caches, position, state.draft.key_mask)
        before = decoder.rows(index - 1 - start)
        x = jnp.take_along_axis(x, before[:, None, None], axis=1)[:, 0]
        drawn = decoder.draw(rngs, module.head(x), index, scales)
        return state._replace(
            tokens=_put(state, index, drawn[:, None]), draft=state.draft._replace(caches=caches)
        )

    # Behind the very first token there is none before it: the second one is a guess, run again.
    state = draw(state, jnp.maximum(first - 2, 0), first, num_new=2)

    def body(offset: Array, state: AheadState) -> AheadState:
        return draw(state, first + offset - 1, first + offset, num_new=1)

    return jax.lax.fori_loop(1, window - 1, body, state)


def _grow(state: AheadState, num_slots: int) -> AheadState:
    """Grow all caches."""
    draft = state.draft
    if draft is not None:
        draft = draft._replace(caches=autoregressive.grow(draft.caches, num_slots))
    return state._replace(caches=autoregressive.grow(state.caches, num_slots), draft=draft)


def _of_rows(decoder: TokenDecoder, position: Int[Array, " B"]) -> Int[Array, "..."]:
    """Positions of all rows; of one image a single one, which needs no scatter into its caches."""
    return position[0] if len(position) == 1 else decoder.rows(position)


def _at(tokens: Int[Array, "B N"], index: Int[Array, "B n"]) -> Int[Array, "B n"]:
    return jnp.take_along_axis(tokens, index, axis=1)


def _put(state: AheadState, first: Int[Array, " B"], drawn: Int[Array, "B n"]) -> Int[Array, "B N"]:
    """Put what is drawn from the token `first` on in the place of guesses; known tokens stay."""
    index = first[:, None] + jnp.arange(drawn.shape[1])
    kept = jnp.where(index < state.known[:, None], _at(state.tokens, index), drawn)
    return jax.vmap(jax.lax.dynamic_update_slice)(state.tokens, kept, (first,))
