"""A D-AR prior that learns from rewards for what it draws."""

from typing import ClassVar

from dar_jax.kinds.dar_from_prior import FromPrior
from dar_jax.tasks.dar_reward import DarRewardTask, RewardConfig


class DarReward(FromPrior):
    """See the module's docstring."""

    name = "dar_reward"
    noun = "a prior that is rewarded"
    teachers: ClassVar = {"reference": FromPrior.trains}
    loss = RewardConfig
    task_class = DarRewardTask
