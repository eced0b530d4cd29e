"""A D-AR prior that learns from another one to need no unconditional rows."""

from typing import ClassVar

from dar_jax.kinds.dar_from_prior import FromPrior
from dar_jax.models.dar.llama import LlamaConfig
from dar_jax.tasks.dar_distilled import DarDistilledTask


class DarDistilled(FromPrior):
    """See the module's docstring."""

    name = "dar_distilled"
    noun = "a prior that is distilled"
    teachers: ClassVar = {"teacher": FromPrior.trains}
    task_class = DarDistilledTask

    def check_guidance(self, model: LlamaConfig, trained: LlamaConfig, where: str) -> None:
        if not model.max_guidance or trained.max_guidance:
            raise ValueError(
                f"config.model.max_guidance={model.max_guidance}, and that of {where} is "
                f"{trained.max_guidance}: a student has a largest scale, its teacher has none"
            )
