"""A D-AR prior that learns from another one to need no unconditional rows."""

from collections.abc import Mapping
from typing import ClassVar

from dar_jax.common import model_dir
from dar_jax.data.base import DataConfig
from dar_jax.kinds.dar_prior import TOKENIZER, DarPrior
from dar_jax.models.dar.llama import LlamaConfig
from dar_jax.models.dar.tokenizer import TokenizerConfig
from dar_jax.nn.compute import Compute
from dar_jax.tasks.base import FrozenModel
from dar_jax.tasks.dar_distilled import DarDistilledTask, DistillationConfig

TEACHER = "teacher"
SHARED = ("vocab_size", "num_tokens", "num_classes", "caption_dim", "condition_tokens")


class DarDistilled(DarPrior):
    """See the module's docstring."""

    name = "dar_distilled"
    noun = "a prior that is distilled"
    trains = DarPrior.name
    teachers: ClassVar = {TEACHER: DarPrior.name}
    loss = DistillationConfig

    def task(
        self,
        model: LlamaConfig,
        loss: DistillationConfig,
        *,
        compute: Compute,
        data: DataConfig,
        companions: Mapping[str, FrozenModel],
    ) -> DarDistilledTask:
        return DarDistilledTask(
            model,
            companions[TOKENIZER],
            compute,
            loss=loss,
            teacher=companions[TEACHER],
            from_codes=self.reads_codes(data),
        )

    def check_companion(
        self, model: LlamaConfig, name: str, companion: LlamaConfig | TokenizerConfig, where: str
    ) -> None:
        if isinstance(companion, TokenizerConfig):
            super().check_companion(model, name, companion, where)
            return
        if not model.guidance_input or companion.guidance_input:
            raise ValueError(
                f"config.model.guidance_input={model.guidance_input}, and that of {where} is "
                f"{companion.guidance_input}: a student has it, its teacher does not"
            )
        check_same(model, companion, SHARED, where)

    def check_data(self, model: LlamaConfig, data: DataConfig, paths: Mapping[str, str]) -> None:
        super().check_data(model, data, paths)
        check_tokenizer(paths, TEACHER)


def check_tokenizer(paths: Mapping[str, str], name: str) -> None:
    """Raise ValueError unless the prior `name` was trained on the codes of the tokenizer."""
    own = model_dir.companion(model_dir.locate(paths[name]), TOKENIZER)
    if model_dir.fingerprint(own) != model_dir.fingerprint(model_dir.locate(paths[TOKENIZER])):
        raise ValueError(
            f"config.tokenizer={paths[TOKENIZER]!r} is another one than that of the {name} "
            f"{paths[name]}: use {own}"
        )


def check_same(model: LlamaConfig, other: LlamaConfig, names: tuple[str, ...], where: str) -> None:
    """Raise ValueError unless both priors are of the same tokens and conditions."""
    for name in names:
        if getattr(model, name) != getattr(other, name):
            raise ValueError(
                f"config.model.{name}={getattr(model, name)}, but the prior in {where} has "
                f"{name}={getattr(other, name)}"
            )
