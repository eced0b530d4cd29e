"""What is not finite is neither applied nor saved."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from dar_jax.common import tree
from dar_jax.common.typing import Any, Params

MAX_SUSPECTS = 8
"""Records that are named of a step that is skipped."""


class SkippedSteps:
    """Counts the steps whose loss or gradient is not finite, which `training.step` does not apply.

    A single broken record in many ends no run, and a run that has diverged ends all the same.
    """

    def __init__(
        self, limit: int, suspects: Callable[[int], Sequence[str]], advice: Callable[[], str]
    ):
        """Count from 0.

        Args:
            limit: so many may be skipped.
            suspects: names the records that may be the cause, given the number of the batch.
            advice: says what there is to go on from.
        """
        self._limit, self._suspects, self._advice = limit, suspects, advice
        self._count = 0

    def is_applied(self, step: int, batch: int, update: Any) -> bool:
        """Tell whether a step was applied; if not, say which records it saw.

        Args:
            step: its number.
            batch: number of its batch.
            update: its metrics, a `clu.metrics.Collection` with `loss` and `grad_norm`.

        Raises:
            ValueError: too many were not.
        """
        loss, norm = float(update.loss.compute()), float(update.grad_norm.compute())
        if np.isfinite(loss) and np.isfinite(norm):
            return True
        self._count += 1
        names = self._suspects(batch)
        more = f" and {len(names) - MAX_SUSPECTS} more" if len(names) > MAX_SUSPECTS else ""
        what = (
            f"step {step}: loss {loss}, gradient norm {norm}; it saw "
            f"{', '.join(names[:MAX_SUSPECTS])}{more}"
        )
        if self._count > self._limit:
            raise ValueError(
                f"{what}; {self._count} steps were skipped, more than "
                f"train.max_skipped={self._limit}; {self._advice()}; look at these records, or "
                "lower optimizer.learning_rate in a new workdir"
            )
        logging.warning("%s; skipped, as %d of at most %d", what, self._count, self._limit)
        return False


def check_parameters(step: int, params: Params, advice: Callable[[], str]) -> None:
    """Raise ValueError, with the name of one, if parameters are not finite.

    Args:
        step: after which they are.
        params: the parameters.
        advice: says what there is to go on from.
    """
    finite = jax.device_get(_are_finite(params))
    wrong = [name for name, value in tree.flatten(finite).items() if not value]
    if wrong:
        raise ValueError(
            f"step {step}: {len(wrong)} parameters are not finite, the first is {wrong[0]}; "
            f"{advice()}; lower optimizer.learning_rate in a new workdir"
        )


@jax.jit
def _are_finite(params: Params) -> Params:
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), params)
