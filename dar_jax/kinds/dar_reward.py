"""A D-AR prior that learns from rewards for what it draws."""

from collections.abc import Mapping
from typing import ClassVar

from dar_jax.data.base import DataConfig
from dar_jax.kinds.dar_distilled import SHARED, check_same, check_tokenizer
from dar_jax.kinds.dar_prior import TOKENIZER, DarPrior
from dar_jax.models.dar.llama import LlamaConfig
from dar_jax.models.dar.tokenizer import TokenizerConfig
from dar_jax.nn.compute import Compute
from dar_jax.tasks.base import FrozenModel
from dar_jax.tasks.dar_reward import DarRewardTask, RewardConfig

REFERENCE = "reference"


class DarReward(DarPrior):
    """See the module's docstring."""

    name = "dar_reward"
    noun = "a prior that is rewarded"
    trains = DarPrior.name
    teachers: ClassVar = {REFERENCE: DarPrior.name}
    loss = RewardConfig

    def task(
        self,
        model: LlamaConfig,
        loss: RewardConfig,
        *,
        compute: Compute,
        data: DataConfig,
        companions: Mapping[str, FrozenModel],
    ) -> DarRewardTask:
        if model.caption_dim is not None:
            raise ValueError("config.model.caption_dim: rewards are for labels, not captions")
        return DarRewardTask(
            model,
            companions[TOKENIZER],
            compute,
            loss=loss,
            reference=companions[REFERENCE],
            from_codes=self.reads_codes(data),
        )

    def check_companion(
        self, model: LlamaConfig, name: str, companion: LlamaConfig | TokenizerConfig, where: str
    ) -> None:
        if isinstance(companion, TokenizerConfig):
            super().check_companion(model, name, companion, where)
        else:
            check_same(model, companion, (*SHARED, "guidance_input"), where)

    def check_data(self, model: LlamaConfig, data: DataConfig, paths: Mapping[str, str]) -> None:
        super().check_data(model, data, paths)
        check_tokenizer(paths, REFERENCE)
