"""Search for D-AR: candidates are judged after every group of tokens; see `sampling.search`.

A prefix of tokens is a whole preview (D-AR section 3.4), so candidates can be judged long before
they are images. They differ in their tokens, not in the noise of the flow decoder.

Cost of an image: n times the tokens that the prior decodes. "likelihood" adds two teacher-forced
passes over the tokens so far for each candidate and group, "classifier" one per class, and the flow
runs once; for a reward of previews it runs n times. See `calls`.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.common.batches import one_ahead
from dar_jax.common.typing import Array, Float, Int, Params, PRNGKeys
from dar_jax.models.dar import draws, sampler
from dar_jax.models.dar.likelihood import class_log_likelihoods, token_log_likelihood
from dar_jax.models.dar.llama import Llama, LlamaConfig
from dar_jax.models.dar.options import DarSampling
from dar_jax.models.dar.tokenizer import Tokenizer, TokenizerConfig
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.sampling.rewards import load_reward
from dar_jax.sampling.search import TOKEN_REWARDS, candidate_keys, survivors


class Calls(NamedTuple):
    """Rows and tokens that the models see for one image.

    Attributes:
        decoded: tokens that the prior decodes one by one.
        scored: tokens that it scores in parallel.
        flow: evaluations of the flow decoder.
    """

    decoded: int
    scored: int
    flow: int


def calls(sampling: DarSampling, prior: LlamaConfig, tokenizer: TokenizerConfig) -> Calls:
    """Count what one image costs with these options."""
    search, num_tokens = sampling.search, prior.num_tokens
    scales = sampling.scales(num_tokens)
    guided = int(np.max(np.flatnonzero(scales != 1), initial=-1)) + 1
    guided *= not prior.max_guidance
    ends = sampler.group_boundaries(tokenizer)
    passes = {"likelihood": 2, "classifier": prior.num_classes}.get(search.reward, 0)
    judged = ends[-1:] if search.method == "end" else ends
    by_tokens = search.reward in TOKEN_REWARDS
    return Calls(
        decoded=search.num * (num_tokens + guided),
        scored=search.num * passes * sum(judged) if search.method else 0,
        flow=sampling.steps(tokenizer) * (1 if by_tokens else search.num),
    )


def stream(
    prior: FunctionalModel[Llama],
    prior_params: Params,
    tokenizer: FunctionalModel[Tokenizer],
    tokenizer_params: Params,
    condition: Array,
    rngs: PRNGKeys,
    sampling: DarSampling,
    *,
    scorer: tuple[FunctionalModel[Llama], Params],
    prefix: Int[Array, "B K"] | None = None,
    key_mask: Array | None = None,
    draft: tuple[FunctionalModel[Llama], Params] | None = None,
    known: sampler.Known | None = None,
    microbatch: int | None = None,
) -> Iterator[sampler.DarPreview]:
    """Return the previews of what is kept, with "end" and "smc" the image only.

    The arguments are those of `sampler.stream`, and `scorer`: the prior and its parameters as they
    run on all tokens of an image at once.
    """
    search, boundaries = sampling.search, sampler.group_boundaries(tokenizer.config)
    condition, own, known_all, prefix, key_mask = jax.tree.map(
        lambda rows: jnp.repeat(rows, search.num, axis=0),
        (condition, rngs, known, prefix, key_mask),
    )
    groups = draws.generate_indices(
        prior,
        prior_params,
        condition,
        candidate_keys(rngs, search.num),
        sampling,
        prefix=prefix,
        key_mask=key_mask,
        boundaries=boundaries,
        draft=draft,
    )
    flow = (tokenizer, tokenizer_params)
    if search.reward in TOKEN_REWARDS:
        reward = token_reward(search.reward, *scorer, condition, key_mask)
        kept = survivors(groups, reward, search, rngs, num_groups=len(boundaries))
        drawn = sampler.previews(*flow, kept, rngs, sampling, known=known, microbatch=microbatch)
        return one_ahead(drawn)
    picture_reward = load_reward(search.reward)
    drawn = sampler.previews(*flow, groups, own, sampling, known=known_all, microbatch=microbatch)

    def reward_of_preview(preview: sampler.DarPreview) -> Array:
        return picture_reward(preview.images, condition)

    num_groups = len(sampler.preview_groups(tokenizer.config, sampling.steps(tokenizer.config)))
    return survivors(drawn, reward_of_preview, search, rngs, num_groups=num_groups)


def token_reward(
    name: str,
    prior: FunctionalModel[Llama],
    params: Params,
    condition: Array,
    caption_mask: Array | None = None,
) -> Callable[[Int[Array, "R n"]], Float[Array, " R"]]:
    """Reward of tokens under the conditions [R, ...] of their rows, in nats; see `Search`."""

    def likelihood(indices: Array) -> Array:
        null = _null_condition(prior, params, batch_size=len(condition))
        score = functools.partial(token_log_likelihood, prior, params, caption_mask=caption_mask)
        of = (score(each, indices=indices) for each in (condition, null))
        return jnp.subtract(*(tokens.sum(axis=1) for tokens in of))

    def classifier(indices: Array) -> Array:
        posterior = jax.nn.log_softmax(class_log_likelihoods(prior, params, indices), axis=1)
        return jnp.take_along_axis(posterior, condition[:, None], axis=1)[:, 0]

    return {"likelihood": likelihood, "classifier": classifier}[name]


@functools.partial(jax.jit, static_argnames=("prior", "batch_size"))
def _null_condition(prior: FunctionalModel[Llama], params: Params, *, batch_size: int) -> Array:
    return prior.bind(params).null_condition(batch_size)
