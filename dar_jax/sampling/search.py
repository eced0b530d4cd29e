"""Search: every image has n candidates, and a reward says again and again which of them go on.

An image is drawn in pieces (groups of tokens, passes, parts of a solver's run), after each of which
its candidates can be judged. With r_g the reward after piece g of G:

    groups   the candidate of greatest r_g goes on, n times: best of n in every piece
    end      the candidate of greatest r_G: best of n
    smc      sequential Monte Carlo: n candidates are drawn, with replacement, with probabilities
             proportional to exp((g r_g - (g - 1) r_{g-1}) / (G temperature)); after the last piece
             they are draws from p(image) exp(r_G / temperature), n growing, and one is taken

Candidate 0 draws as without search. Everything is gathered by index on the device, and nothing
waits.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Generator

import jax
import jax.numpy as jnp

from dar_jax.common import digests
from dar_jax.common.checks import check_number
from dar_jax.common.typing import Any, Array, Float, Int, PRNGKeys
from dar_jax.sampling import autoregressive
from dar_jax.sampling.rewards import load_reward

SEARCHES = ("groups", "end", "smc")
TOKEN_REWARDS = ("likelihood", "classifier")
"""Rewards that look at tokens; any other looks at previews."""
REWARD = "content of search.reward"
CANDIDATE_STREAM = 2**30
"""Folded into an image's key, with c added, for candidate c > 0; what is drawn folds in less."""
RESAMPLING_STREAM = 2**30 + 2**29
"""Likewise, with the piece added, for drawing candidates anew."""


@dataclasses.dataclass(frozen=True)
class Search:
    """How candidates of an image are drawn, and one of them kept; see the module's docstring.

    Attributes:
        method: "groups": after every group of tokens, pass, or quarter of the steps of a model of
            one pass, the best candidate goes on, `num` times; "end": the best of whole images;
            "smc": candidates are drawn anew each time, with probabilities that grow with their
            reward; empty: no search.
        num: candidates of an image.
        reward: a Python file with `reward(images, labels) -> [B]` of previews in [-1, 1], which JAX
            can trace; what is not a number counts least. Where tokens are drawn, also "classifier":
            log-posterior of the label by the prior itself, which costs a pass per class, and
            "likelihood": log p(tokens | label) - log p(tokens), two passes.
        temperature: of "smc": nats of log-probability that a reward is worth, less when colder.
    """

    method: str = ""
    num: int = 1
    reward: str = "classifier"
    temperature: float = 1.0

    def __post_init__(self):
        if self.method not in ("", *SEARCHES):
            raise ValueError(f"search.method={self.method!r} must be one of {', '.join(SEARCHES)}")
        check_number("search.num", self.num, numbers.Integral)
        check_number("search.temperature", self.temperature)
        if self.num < 1 or (self.num > 1) != bool(self.method):
            raise ValueError(
                f"search.method={self.method!r} and search.num={self.num} need each other: a "
                "method, and 2 candidates or more"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"search.temperature={self.temperature} must be above 0 and finite")

    @property
    def by_file(self) -> bool:
        """Whether the reward is a file of the user's."""
        return bool(self.method) and self.reward not in TOKEN_REWARDS

    def check_file(self) -> None:
        """Raise ValueError unless the file that is the reward, if one is, can be used."""
        if self.by_file:
            load_reward(self.reward)

    def content(self) -> dict[str, str]:
        """Digest of the file that is the reward, if one is."""
        return {REWARD: digests.of_file(self.reward)} if self.by_file else {}


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
    """Judge what is drawn after every piece, send back who goes on, and yield whom is kept.

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
        rewards = _least_if_nan(reward(item).reshape(len(rngs), search.num))
        if search.method == "smc":
            old = jnp.zeros_like(rewards) if before is None else before
            old = jnp.where(jnp.isneginf(old), 0.0, old)  # has not been judged
            gain = (group * rewards - (group - 1) * old) / num_groups
            parents = _resample(rngs, _least_if_nan(gain / search.temperature), group)
            before = jnp.take_along_axis(rewards, parents, axis=1)
            if group < num_groups:
                continue
        else:
            best = jnp.argmax(rewards, axis=1)[:, None]
            parents = jnp.broadcast_to(best, rewards.shape)
        yield _first(item, parents)


def _least_if_nan(rewards: Float[Array, "B n"]) -> Float[Array, "B n"]:
    return jnp.where(jnp.isnan(rewards), -jnp.inf, rewards)


@jax.jit
def _resample(rngs: PRNGKeys, logits: Float[Array, "B n"], group: Array | int) -> Array:
    """Draw n candidates of every image with replacement; all go on if none has been judged."""

    def draw(rng: Array, logits: Array) -> Array:
        rng = jax.random.fold_in(rng, RESAMPLING_STREAM + group)
        drawn = jax.random.categorical(rng, logits, shape=logits.shape)
        return jnp.where(jnp.any(logits > -jnp.inf), drawn, jnp.arange(len(logits)))

    return jax.vmap(draw)(rngs, logits)


def _first(item: Any, parents: Int[Array, "B n"]) -> Any:
    """The rows [B, ...] of the candidates that became number 0."""

    def gather(rows: Any) -> Any:
        if not isinstance(rows, jax.Array):
            return rows  # numbers of steps and tokens
        return autoregressive.take(rows, parents)[:: parents.shape[1]]

    return jax.tree.map(gather, item)
