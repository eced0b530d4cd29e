"""Distilling guidance into a D-AR prior (Meng et al. 2023, arXiv:2210.03142, for tokens).

A guided token takes two rows of the prior, the conditional and the unconditional one. The student
takes the scale as an input (`LlamaConfig.max_guidance`) and gives the guided logits with one:

s ~ uniform(1, max_guidance), of every token     so that any schedule of scales can be asked for
target = softmax(unconditional + s (conditional - unconditional))     of the teacher, no gradient
loss = mean cross-entropy of the student's logits(label, indices[:-1], s) against target

The label is dropped as in training a prior, where the target is unconditional, whatever s.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from clu import metrics

from dar_jax.common.typing import Array, Params, PRNGKeyArray
from dar_jax.sampling.logits import guide
from dar_jax.tasks.base import average
from dar_jax.tasks.dar_from_prior import TRAINED, FromPriorTask


class DarDistilledTask(FromPriorTask):
    """See the module's docstring."""

    def loss(
        self, params: Params, batch: Mapping[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> tuple[Array, dict[str, Array]]:
        rng_label, rng_dropout, rng_crop, rng_scale = jax.random.split(rng, 4)
        indices = self._indices(batch, rng_crop, frozen)
        student, teacher = self.model.bind(params), self.trained.bind(frozen[TRAINED])
        condition, mask = self._condition(batch)
        draws = jax.random.uniform(rng_label, (len(condition),))
        condition = student.drop_condition(condition, draws)
        null = teacher.null_condition(len(condition)).astype(condition.dtype)
        scales = jax.random.uniform(
            rng_scale, indices.shape, minval=1.0, maxval=self.model.config.max_guidance
        )
        start = self.model.config.condition_tokens - 1
        conditional, unconditional = (
            teacher.logits(each, indices[:, :-1], mask=mask)[:, start:]
            for each in (condition, null)
        )
        guided = jax.lax.stop_gradient(guide(conditional, unconditional, scales[..., None]))
        target = jax.nn.softmax(guided)
        hidden = student.hidden(
            condition, indices[:, :-1], mask=mask, scales=scales, rng=rng_dropout
        )
        logits = student.head(hidden[:, start:])
        loss = optax.softmax_cross_entropy(logits, target).mean()
        divergence = loss - optax.softmax_cross_entropy(guided, target).mean()
        agreement = jnp.argmax(logits, axis=-1) == jnp.argmax(target, axis=-1)
        return loss, {"divergence": divergence, "agreement": agreement}

    def metrics(self) -> dict[str, type[metrics.Metric]]:
        """Of the student from the teacher: nats a token, and share of equal most likely tokens."""
        names = ("divergence", "agreement")
        return {name: average(name) for name in names}
