"""Search: every image has n candidates, and a reward says after each group which of them go on.

A prefix of tokens is a whole preview (D-AR section 3.4), so candidates can be judged long before
they are images. With r_g the reward after group g of G:

    groups   the candidate of greatest r_g goes on, n times: best of n in every group
    end      the candidate of greatest r_G: best of n
    smc      sequential Monte Carlo: n candidates are drawn, with replacement, with probabilities
             proportional to exp((g r_g - (g - 1) r_{g-1}) / (G temperature)); after the last group
             they are draws from p(tokens) exp(r_G / temperature), n growing, and one is taken

Candidate 0 draws as without search; the others differ in their tokens, not in the noise of the flow
decoder. Caches, tokens and flow states are gathered by index on the device, and nothing waits.

Cost of an image: n times the tokens that the prior decodes. "likelihood" adds two teacher-forced
passes over the tokens so far for each candidate and group, "classifier" one per class, and the flow
runs once; for a reward of previews it runs n times. See `calls`.
"""

from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.common.batches import one_ahead
from dar_jax.common.typing import Any, Array, Float, Int, Params, PRNGKeys
from dar_jax.models.dar import sampler
from dar_jax.models.dar.likelihood import class_log_likelihoods, token_log_likelihood
from dar_jax.models.dar.llama import Llama, LlamaConfig
from dar_jax.models.dar.options import TOKEN_REWARDS, DarSampling, Search
from dar_jax.models.dar.tokenizer import Tokenizer, TokenizerConfig
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.sampling import autoregressive
from dar_jax.sampling.rewards import load_reward

CANDIDATE_STREAM = 2**30
"""Folded into an image's key, with c added, for candidate c > 0; tokens fold in less."""
RESAMPLING_STREAM = 2**30 + 2**29
"""Likewise, with the group added, for drawing candidates anew."""


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
    key_mask: None = None,
    known: sampler.Known | None = None,
    microbatch: int | None = None,
) -> Iterator[sampler.DarPreview]:
    """Return the previews of what is kept, with "end" and "smc" the image only.

    The arguments are those of `sampler.stream`, and `scorer`: the prior and its parameters as they
    run on all tokens of an image at once.
    """
    del key_mask  # the pipeline has refused one
    search, boundaries = sampling.search, sampler.group_boundaries(tokenizer.config)
    condition, own, known_all, prefix = jax.tree.map(
        lambda rows: jnp.repeat(rows, search.num, axis=0), (condition, rngs, known, prefix)
    )
    groups = sampler.generate_indices(
        prior,
        prior_params,
        condition,
        candidate_keys(rngs, search.num),
        sampling,
        prefix=prefix,
        boundaries=boundaries,
    )
    flow = (tokenizer, tokenizer_params)
    if search.reward in TOKEN_REWARDS:
        reward = token_reward(search.reward, *scorer, condition)
        kept = survivors(groups, reward, search, rngs, num_groups=len(boundaries))
        drawn = sampler.previews(*flow, kept, rngs, sampling, known=known, microbatch=microbatch)
        return one_ahead(drawn)
    picture_reward = load_reward(search.reward)
    drawn = sampler.previews(*flow, groups, own, sampling, known=known_all, microbatch=microbatch)

    def reward_of_preview(preview: sampler.DarPreview) -> Array:
        return picture_reward(preview.images, condition)

    num_groups = _num_previews(tokenizer.config)
    return survivors(drawn, reward_of_preview, search, rngs, num_groups=num_groups)


def _num_previews(config: TokenizerConfig) -> int:
    """Groups after which there is an image."""
    return sum(known >= config.window for known in sampler.group_boundaries(config))


def candidate_keys(rngs: PRNGKeys, num: int) -> Array:
    """Keys [B * num] of all candidates, those of an image side by side."""
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    others = jax.vmap(fold, (0, None))(rngs, CANDIDATE_STREAM + jnp.arange(1, num))
    return jnp.concatenate([rngs[:, None], others], axis=1).reshape(-1)


def survivors(
    drawn: Generator[Any, Array | None, None],
    reward: Callable[[Any], Float[Array, " R"]],
    search: Search,
    rngs: PRNGKeys,
    *,
    num_groups: int,
) -> Generator[Any, Any, None]:
    """Judge what is drawn after every group, send back who goes on, and yield whom is kept.

    Args:
        drawn: yields trees of rows [B * num, ...] and takes indices [B, num]; see
            `autoregressive.take`.
        reward: of such rows.
        search: how.
        rngs: one key per image.
        num_groups: how often `drawn` yields.
    """
    before, parents = None, None
    for group in range(1, num_groups + 1):
        item = drawn.send(parents)
        parents = None
        if search.method == "end" and group < num_groups:
            continue
        rewards = reward(item).reshape(len(rngs), search.num)
        if search.method == "smc":
            old = jnp.zeros_like(rewards) if before is None else before
            parents = _resample(
                rngs, (group * rewards - (group - 1) * old) / num_groups / search.temperature, group
            )
            before = jnp.take_along_axis(rewards, parents, axis=1)
            if group < num_groups:
                continue
        else:
            best = jnp.argmax(rewards, axis=1)[:, None]
            parents = jnp.broadcast_to(best, rewards.shape)
        yield _first(item, parents)


@jax.jit
def _resample(rngs: PRNGKeys, logits: Float[Array, "B n"], group: Array | int) -> Array:
    """Draw n candidates of every image with replacement."""

    def draw(rng: Array, logits: Array) -> Array:
        rng = jax.random.fold_in(rng, RESAMPLING_STREAM + group)
        return jax.random.categorical(rng, logits, shape=logits.shape)

    return jax.vmap(draw)(rngs, logits)


def _first(item: Any, parents: Int[Array, "B n"]) -> Any:
    """The rows [B, ...] of the candidates that became number 0."""

    def gather(rows: Any) -> Any:
        if not isinstance(rows, jax.Array):
            return rows  # numbers of steps and tokens
        return autoregressive.take(rows, parents)[:: parents.shape[1]]

    return jax.tree.map(gather, item)


def token_reward(
    name: str, prior: FunctionalModel[Llama], params: Params, condition: Array
) -> Callable[[Int[Array, "R n"]], Float[Array, " R"]]:
    """Reward of tokens under the conditions [R, ...] of their rows, in nats; see `Search`."""

    def likelihood(indices: Array) -> Array:
        null = jax.jit(lambda params: prior.bind(params).null_condition(len(condition)))(params)
        of = (token_log_likelihood(prior, params, each, indices) for each in (condition, null))
        return jnp.subtract(*(tokens.sum(axis=1) for tokens in of))

    def classifier(indices: Array) -> Array:
        posterior = jax.nn.log_softmax(class_log_likelihoods(prior, params, indices), axis=1)
        return jnp.take_along_axis(posterior, condition[:, None], axis=1)[:, 0]

    return {"likelihood": likelihood, "classifier": classifier}[name]
