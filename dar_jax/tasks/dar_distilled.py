"""Distilling guidance into a D-AR prior (Meng et al. 2023, arXiv:2210.03142, for tokens).

A guided token takes two rows of the prior, the conditional and the unconditional one. The student
takes the scale as an input (`LlamaConfig.guidance_input`) and gives the guided logits with one:

s ~ uniform(1, max_scale), of every token        so that any schedule of scales can be asked for
target = softmax(unconditional + s (conditional - unconditional))     of the teacher, no gradient
loss = mean cross-entropy of the student's logits(label, indices[:-1], s) against target

The label is dropped as in training a prior, where the target is unconditional, whatever s.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from clu import metrics

from dar_jax.common.typing import Any, Array, Params, PRNGKeyArray
from dar_jax.sampling.logits import guide
from dar_jax.tasks.base import FrozenModel
from dar_jax.tasks.dar_prior import DarPriorTask


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """What is distilled.

    Attributes:
        max_scale: guidance scales from 1 to this one are learnt.
    """

    max_scale: float = 8.0

    def __post_init__(self):
        if not self.max_scale > 1:
            raise ValueError(f"max_scale={self.max_scale} must be above 1, which is no guidance")


class DarDistilledTask(DarPriorTask):
    """See the module's docstring."""

    def __init__(
        self, *of_prior: Any, loss: DistillationConfig, teacher: FrozenModel, **options: Any
    ):
        """Build the task.

        Args:
            of_prior: see `DarPriorTask`.
            loss: what is distilled.
            teacher: the prior whose guided logits are learnt.
            options: see `DarPriorTask`.
        """
        super().__init__(*of_prior, **options)
        self.max_scale = loss.max_scale
        self.teacher, self._teacher_params = teacher

    def frozen(self) -> Params:
        return {**super().frozen(), "teacher": self._teacher_params}

    def abstract_frozen(self) -> Params:
        return {**super().abstract_frozen(), "teacher": self.teacher.abstract_params()}

    def loss(
        self, params: Params, batch: Mapping[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> tuple[Array, dict[str, Array]]:
        rng_label, rng_dropout, rng_crop, rng_scale = jax.random.split(rng, 4)
        indices = self._indices(batch, rng_crop, frozen)
        student, teacher = self.model.bind(params), self.teacher.bind(frozen["teacher"])
        condition, mask = self._condition(batch)
        draws = jax.random.uniform(rng_label, (len(condition),))
        condition = student.drop_condition(condition, draws)
        null = teacher.null_condition(len(condition)).astype(condition.dtype)
        scales = jax.random.uniform(rng_scale, indices.shape, minval=1.0, maxval=self.max_scale)
        start = self.model.config.condition_tokens - 1
        conditional, unconditional = (
            teacher.logits(each, indices[:, :-1], mask=mask)[:, start:]
            for each in (condition, null)
        )
        target = jax.nn.softmax(guide(conditional, unconditional, scales[..., None]))
        hidden = student.hidden(
            condition, indices[:, :-1], mask=mask, scales=scales, rng=rng_dropout
        )
        logits = student.head(hidden[:, start:])
        loss = optax.softmax_cross_entropy(logits, jax.lax.stop_gradient(target)).mean()
        divergence = loss - optax.softmax_cross_entropy(jnp.log(target + 1e-30), target).mean()
        agreement = jnp.argmax(logits, axis=-1) == jnp.argmax(target, axis=-1)
        return loss, {"divergence": divergence, "agreement": agreement}

    def metrics(self) -> dict[str, type[metrics.Metric]]:
        """Of the student from the teacher: nats a token, and share of equal most likely tokens."""
        names = ("divergence", "agreement")
        return {name: metrics.Average.from_output(name) for name in names}
