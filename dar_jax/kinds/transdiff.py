"""TransDiff and its multi-reference form over the latents of a KL autoencoder."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dar_jax.common.typing import Any, Params
from dar_jax.convert import transdiff
from dar_jax.convert.checkpoints import Checkpoint
from dar_jax.data import latents
from dar_jax.data.base import DataConfig
from dar_jax.flow import solvers
from dar_jax.kinds.base import Kind
from dar_jax.kinds.kl_vae import KlVaeKind
from dar_jax.kinds.transdiff_runs import TransDiffRuns
from dar_jax.models.kl_vae import KlVaeConfig
from dar_jax.models.transdiff import sampler
from dar_jax.models.transdiff.model import TransDiff, TransDiffConfig
from dar_jax.models.transdiff.options import TransDiffSampling
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.performance.programs import Program, abstract, over_all_devices, sampling_params
from dar_jax.pipelines.transdiff import LatentPipeline, TransDiffPipeline
from dar_jax.tasks.base import FrozenModel
from dar_jax.tasks.transdiff import TransDiffLossConfig, TransDiffTask

VAE = "vae"
LATENT_SOURCES = (latents.FORM.kind, "latent_folder")
GUIDED = 2.0
"""A guidance scale; all make the same program."""


class TransDiffKind(Kind[TransDiffConfig]):
    """See the module's docstring."""

    name = "transdiff"
    noun = "a model of latents"
    module = TransDiff
    architecture = TransDiffConfig
    loss = TransDiffLossConfig
    pipeline = TransDiffPipeline
    companions: ClassVar = {VAE: KlVaeKind.name}
    runs = TransDiffRuns
    caches = LATENT_SOURCES
    takes_references = True

    def task(
        self,
        model: TransDiffConfig,
        loss: TransDiffLossConfig,
        *,
        compute: Compute,
        data: DataConfig,
        companions: Mapping[str, FrozenModel],
    ) -> TransDiffTask:
        return TransDiffTask(
            model,
            loss,
            companions[VAE],
            compute,
            image_size=data.image_size,
            from_moments=data.source in LATENT_SOURCES,
        )

    def make_pipeline(
        self,
        model: FunctionalModel,
        params: Params,
        *,
        companions: Mapping[str, Any],
        class_names: Sequence[str] = (),
        mesh: Mesh | None = None,
    ) -> TransDiffPipeline:
        prior = LatentPipeline(model, params, mesh=mesh)
        return TransDiffPipeline(prior, companions[VAE], class_names=class_names)

    def check_companion(
        self, model: TransDiffConfig, name: str, companion: KlVaeConfig, where: str
    ) -> None:
        sampler.check_vae(model, companion, where)

    def check_data(
        self, model: TransDiffConfig, data: DataConfig, paths: Mapping[str, str]
    ) -> None:
        super().check_data(model, data, paths)
        if data.source in LATENT_SOURCES:
            shape = (model.latent_size, model.latent_size, 2 * model.channels)
            latents.check_latents(data, paths[VAE], shape)

    def from_reference(
        self, checkpoint: Checkpoint, model: TransDiffConfig
    ) -> tuple[TransDiffConfig, Params, Sequence[str]]:
        return model, transdiff.transdiff_params(checkpoint.state_dict, model), ()

    def to_reference(self, params: Params, model: TransDiffConfig) -> dict[str, Any]:
        return transdiff.transdiff_state_dict(params, model)

    def programs(self, task: TransDiffTask, mesh: Mesh, images: int) -> Iterator[Program]:
        """The condition of the last pass, and one of its steps: those with the most tokens."""
        model, config, split = task.model, task.model.config, over_all_devices(mesh)
        params = sampling_params(model, mesh)
        latent = (config.latent_size, config.latent_size, config.channels)
        before = (images, config.num_references - 1, *latent)
        encode = functools.partial(sampler.condition_caches, model, guided=True)
        arguments = (
            params,
            jax.ShapeDtypeStruct((images,), jnp.int32, sharding=split),
            jax.ShapeDtypeStruct(before, jnp.float32, sharding=split),
        )
        yield Program("condition", jax.jit(encode), arguments, {}, images)

        caches = jax.eval_shape(encode, *arguments)
        noise = jax.ShapeDtypeStruct((images, *latent), jnp.float32)
        solver = TransDiffSampling()
        arguments = (
            model,
            params,
            abstract(caches, NamedSharding(mesh, PartitionSpec(None, mesh.axis_names))),
            abstract(jax.eval_shape(solvers.start, noise), split),
            solver.grid[-2:],
            solver.coefficients.select(slice(-1, None)),
            None,
        )
        options = {"scale": GUIDED, "interval": solver.guided_times}
        yield Program("flow step", sampler.advance, arguments, options, images)
