"""What other trainings of a D-AR prior share, which learn with the help of a trained one."""

from collections.abc import Mapping
from typing import Any

from dar_jax.common import model_dir
from dar_jax.data.base import DataConfig
from dar_jax.kinds.dar_prior import TOKENIZER, DarPrior
from dar_jax.models.dar.llama import SHARED, LlamaConfig
from dar_jax.models.dar.tokenizer import TokenizerConfig
from dar_jax.nn.compute import Compute
from dar_jax.tasks.base import FrozenModel
from dar_jax.tasks.dar_from_prior import FromPriorTask


class FromPrior(DarPrior):
    """Another way to train a prior.

    Attributes:
        task_class: of the training; the one entry of `teachers` names the trained prior.
    """

    trains = DarPrior.name
    task_class: type[FromPriorTask]

    @property
    def role(self) -> str:
        """Name of the key that holds the path of the trained prior."""
        (role,) = self.teachers
        return role

    def task(
        self,
        model: LlamaConfig,
        loss: Any,
        *,
        compute: Compute,
        data: DataConfig,
        companions: Mapping[str, FrozenModel],
    ) -> FromPriorTask:
        model, trained = self.with_text_digest(model, data), companions[self.role]
        own, others = (each.text_digest for each in (model, trained.model.config))
        if own and others and own != others:
            raise ValueError(
                f"config.{self.role} was trained on captions of text_digest={others!r}, those here "
                f"have {own!r}: encode them with the text encoder of that prior"
            )
        return self.task_class(
            model,
            companions[TOKENIZER],
            compute,
            loss=loss,
            trained=trained,
            from_codes=self.reads_codes(data),
        )

    def check_companion(
        self, model: LlamaConfig, name: str, companion: LlamaConfig | TokenizerConfig, where: str
    ) -> None:
        if isinstance(companion, TokenizerConfig):
            super().check_companion(model, name, companion, where)
            return
        self.check_guidance(model, companion, where)
        for shared in SHARED:
            if getattr(model, shared) != getattr(companion, shared):
                raise ValueError(
                    f"config.model.{shared}={getattr(model, shared)}, but the prior in {where} has "
                    f"{shared}={getattr(companion, shared)}"
                )

    def check_guidance(self, model: LlamaConfig, trained: LlamaConfig, where: str) -> None:
        """Raise ValueError unless guidance is an input of both priors, or of neither."""
        if model.max_guidance != trained.max_guidance:
            raise ValueError(
                f"config.model.max_guidance={model.max_guidance}, but the prior in {where} has "
                f"max_guidance={trained.max_guidance}"
            )

    def check_data(self, model: LlamaConfig, data: DataConfig, paths: Mapping[str, str]) -> None:
        super().check_data(model, data, paths)
        own = model_dir.companion(model_dir.locate(paths[self.role]), TOKENIZER)
        if model_dir.fingerprint(own) != model_dir.fingerprint(model_dir.locate(paths[TOKENIZER])):
            raise ValueError(
                f"config.tokenizer={paths[TOKENIZER]!r} is another one than that of the "
                f"{self.role} {paths[self.role]}: use {own}"
            )
