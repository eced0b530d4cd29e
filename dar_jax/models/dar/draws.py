"""Tokens of labels or captions, drawn by the D-AR prior in groups."""

import functools
from collections.abc import Callable, Generator

import einops
import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.common.compiled import call
from dar_jax.common.typing import Any, Array, Float, Int, Params, PRNGKeys
from dar_jax.models.dar.llama import Llama, caption_key_mask, has_kernels
from dar_jax.models.dar.options import DarSampling
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.sampling import groups
from dar_jax.sampling.autoregressive import Conditioned, TokenDecoder

GROUP_SIZE = 32
"""Tokens that one compiled program decodes where no tokenizer says otherwise."""
TOKENS_OF_DRAFT = 2
"""That it runs at a time, at most; see `lookahead.guess`."""


def generate_indices(
    model: FunctionalModel[Llama],
    params: Params,
    condition: Array,
    rngs: PRNGKeys,
    sampling: DarSampling,
    *,
    prefix: Int[Array, "B K"] | None = None,
    boundaries: tuple[int, ...] | None = None,
    key_mask: Array | None = None,
    draft: tuple[FunctionalModel[Llama], Params] | None = None,
    run: Callable[..., Any] = call,
) -> Generator[Int[Array, "B n"], Int[Array, "B n"] | None, None]:
    """Yield the tokens so far after every group; sends are those of `groups.generate`.

    Args:
        model: the prior, unstacked.
        params: its unstacked parameters.
        condition: labels [B] or captions [B, T, F].
        rngs: one key per image.
        sampling: how tokens are drawn.
        prefix: tokens to start from.
        boundaries: token counts to yield at; None yields after every 32 tokens.
        key_mask: False for padded condition tokens, [B, T]; see `llama.caption_key_mask`.
        draft: a smaller prior and its parameters, both unstacked, that guesses where there is
            look-ahead.
        run: see `groups.generate`.
    """
    num_tokens = model.config.num_tokens
    scales, window = sampling.scales(num_tokens), sampling.window(len(condition))
    if prefix is None:
        prefix = jnp.zeros((len(condition), 0), jnp.int32)

    def conditioned(model: FunctionalModel[Llama], params: Params) -> Conditioned:
        guided = bool(np.any(scales != 1)) and not model.config.max_guidance
        decoder = TokenDecoder(model, model.config.condition_tokens, sampling.tokens, guided)
        rows = run(embed_rows, model, params, condition, guided=guided)
        if key_mask is None:
            return Conditioned(decoder, params, rows, None)
        mask = caption_key_mask(decoder.rows(key_mask), num_tokens + window)
        return Conditioned(decoder, params, rows, mask)

    guessing = draft if window else None
    have_kernels = has_kernels(model.config, model.compute, window)
    if guessing is not None:
        have_kernels &= has_kernels(guessing[0].config, guessing[0].compute, TOKENS_OF_DRAFT)
    yield from groups.generate(
        conditioned(model, params),
        prefix,
        rngs,
        scales,
        boundaries=boundaries or _ends(num_tokens, GROUP_SIZE),
        window=window,
        draft=guessing and conditioned(*guessing),
        attends_filled=key_mask is None and have_kernels,
        run=run,
    )


@functools.partial(jax.jit, static_argnames=("model", "guided"))
def embed_rows(
    model: FunctionalModel[Llama], params: Params, condition: Array, *, guided: bool
) -> Float[Array, "R T D"]:
    """Embed the conditions; if guided, the null condition follows each."""
    prior = model.bind(params)
    if guided:
        null = prior.null_condition(len(condition)).astype(condition.dtype)
        condition = einops.rearrange([condition, null], "two b ... -> (b two) ...")
    return prior.embed_condition(condition)


def _ends(num_tokens: int, group_size: int) -> tuple[int, ...]:
    """Number of tokens after each full group, and all of them."""
    return (*range(group_size, num_tokens, group_size), num_tokens)
