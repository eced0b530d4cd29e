"""Flow loss by time group: which part of the trajectory, and so which group of tokens, is hard.

Times fall into the groups whose tokens condition them, see `models.dar.tokenizer.window_start`.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from clu import metrics

from dar_jax.common.typing import Any, Array, Float, Int


def time_group(u: Float[Array, " B"], num_groups: int) -> Int[Array, " B"]:
    """Group 0 .. num_groups - 1 of unshifted times in [0, 1)."""
    group = jnp.floor(u * num_groups + 0.5).astype(jnp.int32)
    return jnp.clip(group, 0, num_groups - 1)


def group_sums(
    loss: Float[Array, " B"], group: Int[Array, " B"], num_groups: int
) -> Float[Array, "two G"]:
    """Sum of the losses and number of samples of every group."""
    pairs = jnp.stack([loss, jnp.ones_like(loss)], axis=-1)
    return jax.ops.segment_sum(pairs, group, num_groups).T


@functools.cache
def group_average(group: int) -> type[metrics.Metric]:
    """Return the mean loss of one group over a logging interval; NaN where no sample fell into it.

    It is made from the output `group_sums`.
    """

    @flax.struct.dataclass
    class GroupAverage(metrics.Average):
        total: Any  # of JAX, or of NumPy on the host
        count: Any

        @classmethod
        def from_model_output(cls, *, group_sums: Array, **_) -> "GroupAverage":
            return cls(total=group_sums[0, group], count=group_sums[1, group])

        def compute(self) -> Array:
            mean = self.total / jnp.maximum(self.count, 1.0)
            return jnp.where(self.count > 0, mean, jnp.nan)

    return GroupAverage
