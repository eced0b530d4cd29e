"""Decoding in groups of tokens.

Caches grow between groups, so that a program attends a prefix of static length: half the bytes that
one padded cache would have it read. Where the next growth is small beside the weights, a group has
its slots from the beginning and shares its program.
"""

import dataclasses
from collections.abc import Callable, Generator, Sequence

import jax.numpy as jnp
import numpy as np

from dar_jax.common.compiled import call
from dar_jax.common.tree import tree_bytes
from dar_jax.common.typing import Any, Array, Float, Int, PRNGKeys
from dar_jax.sampling.autoregressive import (
    Conditioned,
    decode,
    prefill,
    slot_bytes,
    take,
    tokens_between,
    without_unconditional,
)
from dar_jax.sampling.lookahead import AheadState, decode_ahead, start_ahead

SMALL_GROWTH = 2**25
"""Bytes of empty slots that fit beside the compute units, where reading them costs little."""
SMALL_SHARE = 0.02
"""Likewise, as a share of the weights, which are read with them."""


def generate(
    model: Conditioned,
    prefix: Int[Array, "B K"],
    rngs: PRNGKeys,
    scales: Float[np.ndarray, " N"],
    *,
    boundaries: Sequence[int],
    window: int = 0,
    draft: Conditioned | None = None,
    attends_filled: bool = False,
    run: Callable[..., Any] = call,
) -> Generator[Int[Array, "B n"], Int[Array, "B n"] | None, None]:
    """Yield all tokens so far, the prefix included, whenever a group is complete.

    What is sent back, if anything, says which rows to go on with; see `take`. Nothing waits for the
    device: the next group can be dispatched while the last one is used.

    Args:
        model: which model draws, and what for.
        prefix: given image tokens, K < N.
        rngs: one key per image.
        scales: guidance scale of every image token. Where no later one differs from 1, a group is
            decoded without unconditional rows.
        boundaries: increasing numbers of tokens after which to yield; the last one ends.
        window: tokens that a call of look-ahead draws; 0 is none.
        draft: a smaller model, of as many tokens and condition tokens, that guesses them; None
            without look-ahead.
        attends_filled: slots that are not filled are not read, so that caches need not grow.
        run: calls jitted functions, or records them; see `common.compiled`.
    """
    device_scales, num_condition = jnp.asarray(scales), model.decoder.num_condition
    start, beyond = prefix.shape[1] + 1, num_condition - 1 + max(window - 1, 0)
    spare = len(scales) if attends_filled else _spare_slots(model)
    num_slots = slots_of_groups([beyond + max(stop, start) for stop in boundaries], spare)

    def begin(each: Conditioned) -> Any:
        inputs = (each.condition, prefix, rngs, device_scales, each.key_mask)
        return run(prefill, each.decoder, each.params, *inputs, num_slots=num_slots[0])

    state: Any = begin(model)
    if window:
        state = run(start_ahead, state, draft and begin(draft), start, window=window)
    for stop, slots in zip(boundaries, num_slots, strict=True):
        if np.all(scales[start:] == 1):
            model, draft, state = _without_guidance(model, draft, state, run)
        if stop > start:
            fixed = (model.decoder, model.params, state, rngs, device_scales)
            ends = dict(stop=stop, num_slots=slots)
            if window:
                state = run(decode_ahead, *fixed, draft and draft[:2], window=window, **ends)
            else:
                state = run(decode, *fixed, start=start, **ends)
            start = stop
        parents = yield run(tokens_between, state.tokens, start=0, stop=stop)
        if parents is not None:
            state = take(state, parents)
            if isinstance(state, AheadState):  # beyond, tokens are the parent's draws
                state = state._replace(known=jnp.minimum(state.known, stop))


def _without_guidance(
    model: Conditioned, draft: Conditioned | None, state: Any, run: Callable[..., Any]
) -> tuple[Conditioned, Conditioned | None, Any]:
    """Go on without unconditional rows, where there are some."""
    if model.decoder.guided:
        model, state = _unguided(model), run(without_unconditional, state)
    if draft is not None and draft.decoder.guided:
        draft = _unguided(draft)
        state = state._replace(draft=run(without_unconditional, state.draft))
    return model, draft, state


def _unguided(model: Conditioned) -> Conditioned:
    return model._replace(decoder=dataclasses.replace(model.decoder, guided=False))


def slots_of_groups(needed: Sequence[int], spare: int) -> list[int]:
    """Return the slots of each group's caches: those of the last one within `spare` of its own.

    Args:
        needed: what each group needs at least, increasing.
        spare: slots that may be empty when a group is done.
    """
    slots = [needed[-1]]
    for least in reversed(needed[:-1]):
        slots.append(slots[-1] if slots[-1] - least <= spare else least)
    return slots[::-1]


def _spare_slots(model: Conditioned) -> int:
    """How many more slots of all rows cost little to read."""
    num_bytes = max(SMALL_GROWTH, SMALL_SHARE * tree_bytes(model.params))
    return int(num_bytes // (len(model.condition) * slot_bytes(model.decoder.model)))
