"""The KL autoencoder, in whose latents TransDiff works."""

from collections.abc import Mapping, Sequence

from jax.sharding import Mesh

from dar_jax.common.typing import Any, Params
from dar_jax.convert import kl_vae
from dar_jax.convert.checkpoints import Checkpoint
from dar_jax.data.base import DataConfig
from dar_jax.kinds.base import Kind
from dar_jax.models.kl_vae import KlVae, KlVaeConfig
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.pipelines.base import ModelPipeline
from dar_jax.pipelines.kl_vae import KlVaePipeline
from dar_jax.tasks.base import FrozenModel
from dar_jax.tasks.kl_vae import KlVaeLossConfig, KlVaeTask


class KlVaeKind(Kind[KlVaeConfig]):
    """See the module's docstring."""

    name = "kl_vae"
    noun = "a KL autoencoder"
    module = KlVae
    architecture = KlVaeConfig
    released = KlVaeConfig()
    loss = KlVaeLossConfig
    pipeline = KlVaePipeline

    def task(
        self,
        model: KlVaeConfig,
        loss: KlVaeLossConfig,
        *,
        compute: Compute,
        data: DataConfig,
        companions: Mapping[str, FrozenModel],
    ) -> KlVaeTask:
        return KlVaeTask(model, loss, compute, image_size=data.image_size)

    def make_pipeline(
        self,
        model: FunctionalModel,
        params: Params,
        *,
        companions: Mapping[str, ModelPipeline],
        class_names: Sequence[str] = (),
        mesh: Mesh | None = None,
    ) -> KlVaePipeline:
        return KlVaePipeline(model, params, class_names=class_names, mesh=mesh)

    def from_reference(
        self, checkpoint: Checkpoint, model: KlVaeConfig
    ) -> tuple[KlVaeConfig, Params, Sequence[str]]:
        params = kl_vae.params(checkpoint.state_dict, model)
        return model, params, kl_vae.unused_keys(checkpoint.state_dict)

    def to_reference(self, params: Params, model: KlVaeConfig) -> dict[str, Any]:
        return kl_vae.state_dict(params, model)
