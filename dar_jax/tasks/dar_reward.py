"""Training a D-AR prior by reward: GRPO (Shao et al. 2024, arXiv:2402.03300) on its own samples.

Every label of a batch is drawn `group_size` times by the prior as it is, and every sample judged
after each group of tokens, since each prefix has a picture (D-AR section 3.4): r_1 .. r_G.

z_g = (r_g - mean of r_g) / deviation of r_g                   over the samples of the label
advantage A of the tokens of group g = mean of z_g .. z_G      what they may have changed; or z_G
loss = mean of -A log p(token) + kl_weight KL(prior || reference)
A = 0 for a whole batch whose mean KL is above max_divergence: its step leads back, and no further

A step learns from samples of the very parameters that it changes, once, so that the ratio that PPO
and GRPO clip is 1. The divergence is the exact one over the vocabulary, of every drawn token.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

from dar_jax.common.typing import Any, Array, Float, Int, Params, PRNGKeyArray
from dar_jax.flow.times import check_num_steps
from dar_jax.models.dar import draws, sampler, search
from dar_jax.models.dar.decoding import decoding_params
from dar_jax.models.dar.options import DarSampling
from dar_jax.nn.linear import whole
from dar_jax.sampling.rewards import load_reward
from dar_jax.sampling.search import TOKEN_REWARDS
from dar_jax.tasks.base import average
from dar_jax.tasks.dar_from_prior import TRAINED, FromPriorTask

MIN_DEVIATION = 1e-4
"""Samples that are all as good teach nothing; their advantages are not blown up."""


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """What is rewarded.

    Attributes:
        reward: "classifier" or "likelihood", by the reference prior, or a Python file: see
            `dar_jax.Search`.
        group_size: samples of every label of a batch.
        dense: rewards of all groups of tokens count, not only that of the image.
        kl_weight: of the divergence from the reference, per nat and token.
        max_divergence: nats a token from the reference that are not exceeded by more than a few
            steps go, since batches beyond are not rewarded; 0 is no limit.
        num_steps: denoising steps of the pictures that a file judges; 0 takes the model's.
    """

    reward: str = "classifier"
    group_size: int = 8
    dense: bool = True
    kl_weight: float = 0.05
    max_divergence: float = 0.0
    num_steps: int = 0

    def __post_init__(self):
        if self.group_size < 2:
            raise ValueError(f"group_size={self.group_size} must be at least 2: samples to compare")
        check_num_steps(self.num_steps, least=0)
        if self.kl_weight < 0:
            raise ValueError(f"kl_weight={self.kl_weight} must be at least 0")
        if self.max_divergence < 0 or (self.max_divergence and not self.kl_weight):
            raise ValueError(
                f"max_divergence={self.max_divergence} must be at least 0 (0 is no limit), and "
                f"needs a kl_weight={self.kl_weight} above 0 to return"
            )


class DarRewardTask(FromPriorTask):
    """See the module's docstring."""

    config: RewardConfig

    def __init__(self, *of_prior: Any, **options: Any):
        """See `FromPriorTask`.

        Raises:
            ValueError: no such reward, or the prior draws captions, or with int8.
        """
        super().__init__(*of_prior, **options)
        if self.model.config.caption_dim is not None:
            raise ValueError("config.model.caption_dim: rewards are for labels, use None")
        if stores := self.model.compute.quantized:
            names = ", ".join(f"config.compute.{name}={store}" for name, store in stores.items())
            raise ValueError(f"{names} draws with another model than learns: leave it at compute")
        if self.config.reward not in TOKEN_REWARDS:
            load_reward(self.config.reward)

    def loss(
        self, params: Params, batch: Mapping[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> tuple[Array, dict[str, Array]]:
        config, size = self.model.config, self.config.group_size
        labels = jnp.repeat(batch["label"], size)
        indices, rewards = self._rollout(jax.lax.stop_gradient(params), labels, rng, frozen)
        advantages = self._advantages(rewards)
        logits, reference = (
            model.bind(of).logits(labels, indices[:, :-1])[:, config.condition_tokens - 1 :]
            for model, of in ((self.model, params), (self.trained, frozen[TRAINED]))
        )
        log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
        drawn = jnp.take_along_axis(log_p, indices[..., None], axis=-1)[..., 0]
        divergence = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        limit = self.config.max_divergence or jnp.inf
        advantages = jnp.where(divergence.mean() > limit, 0.0, advantages)
        loss = -jnp.mean(advantages * drawn) + self.config.kl_weight * divergence.mean()
        own = indices.reshape(-1, size, config.num_tokens)
        differs = own[:, :, None] != own[:, None]  # each sample from itself nowhere
        return loss, {
            "reward": rewards[:, -1],
            "divergence": divergence,
            "diversity": jnp.mean(differs) * size / (size - 1),
        }

    def _rollout(
        self, params: Params, labels: Int[Array, " R"], rng: PRNGKeyArray, frozen: Params
    ) -> tuple[Int[Array, "R N"], Float[Array, "R G"]]:
        """Draw tokens, and judge them after every group."""
        rngs = jax.random.split(rng, len(labels))
        sampling = DarSampling(num_steps=self.config.num_steps)
        groups = draws.generate_indices(
            self.model.unstacked(),
            decoding_params(whole(params)),
            labels,
            rngs,
            sampling,
            boundaries=sampler.group_boundaries(self.tokenizer.config),
        )
        name = self.config.reward
        if name in TOKEN_REWARDS:
            judge = search.token_reward(name, self.trained, frozen[TRAINED], labels)
            rewards = [judge(indices := known) for known in groups]
        else:
            flow = (self.tokenizer, frozen["tokenizer"], groups, rngs, sampling)
            previews, judge = list(sampler.previews(*flow)), load_reward(name)
            rewards = [judge(preview.images, labels) for preview in previews]
            indices = previews[-1].indices
        return indices, jnp.stack(rewards, axis=1).astype(jnp.float32)

    def _advantages(self, rewards: Float[Array, "R G"]) -> Float[Array, "R N"]:
        """Compare the samples of a label with each other; see the module's docstring."""
        own = rewards.reshape(-1, self.config.group_size, rewards.shape[1])
        deviation = own.std(axis=1, keepdims=True) + MIN_DEVIATION
        scores = ((own - own.mean(axis=1, keepdims=True)) / deviation).reshape(rewards.shape)
        advantages = jnp.broadcast_to(scores[:, -1:], rewards.shape)
        if self.config.dense:
            later = jnp.cumsum(scores[:, ::-1], axis=1)[:, ::-1]
            advantages = later / jnp.arange(rewards.shape[1], 0, -1)
        # Groups without a picture of their own belong to the first one that has.
        ends = sampler.group_boundaries(self.tokenizer.config)[-rewards.shape[1] :]
        return advantages[:, np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))]

    def metrics(self) -> dict[str, type[metrics.Metric]]:
        """Reward of images, nats a token from the reference, and diversity.

        Diversity is the share of places where two samples of a label have different tokens.
        """
        names = ("reward", "divergence", "diversity")
        return {name: average(name) for name in names}

    def files(self) -> dict[str, str]:
        name = self.config.reward
        return {} if name in TOKEN_REWARDS else {"loss.reward": name}

    @property
    def why_negative(self) -> str:
        return "it is an advantage over other samples, whose mean is zero, times log-probabilities"
