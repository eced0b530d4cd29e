"""What trainings of a D-AR prior share that need a trained one beside it."""

from typing import Any

from dar_jax.common.typing import Params
from dar_jax.models.dar.llama import LlamaConfig
from dar_jax.nn.compute import Compute
from dar_jax.tasks.base import FrozenModel
from dar_jax.tasks.dar_prior import DarPriorTask

TRAINED = "trained"


class FromPriorTask(DarPriorTask):
    """Trains a prior; another one, which is not trained, is `trained` and `frozen["trained"]`."""

    def __init__(
        self,
        config: LlamaConfig,
        tokenizer: FrozenModel,
        compute: Compute,
        *,
        loss: Any,
        trained: FrozenModel,
        from_codes: bool = False,
    ):
        """Build the task.

        Args:
            config: the prior's architecture.
            tokenizer: of both priors.
            compute: execution choices of the prior.
            loss: of the kind's class.
            trained: the other prior.
            from_codes: see `DarPriorTask`.
        """
        super().__init__(config, tokenizer, compute, from_codes=from_codes)
        self.config = loss
        self.trained, self._trained_params = trained

    def frozen(self) -> Params:
        return {**super().frozen(), TRAINED: self._trained_params}

    def abstract_frozen(self) -> Params:
        return {**super().abstract_frozen(), TRAINED: self.trained.abstract_params()}
