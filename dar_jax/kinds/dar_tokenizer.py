"""The sequential diffusion tokenizer of D-AR: images to tokens and back."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from dar_jax.common.typing import Any, Params
from dar_jax.convert import dar
from dar_jax.convert.checkpoints import Checkpoint
from dar_jax.data.base import DataConfig
from dar_jax.kinds.base import Kind
from dar_jax.models.dar import sampler
from dar_jax.models.dar.tokenizer import Tokenizer, TokenizerConfig
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.performance.programs import Program, over_all_devices, sampling_params
from dar_jax.pipelines.base import ModelPipeline
from dar_jax.pipelines.dar import TokenizerPipeline
from dar_jax.tasks.base import FrozenModel
from dar_jax.tasks.dar_tokenizer import DarTokenizerTask
from dar_jax.tasks.loss_nets import TokenizerLossConfig


class DarTokenizer(Kind[TokenizerConfig]):
    """See the module's docstring."""

    name = "dar_tokenizer"
    noun = "a tokenizer"
    module = Tokenizer
    architecture = TokenizerConfig
    released = TokenizerConfig(tokens_per_step=32)
    loss = TokenizerLossConfig
    pipeline = TokenizerPipeline

    def task(
        self,
        model: TokenizerConfig,
        loss: TokenizerLossConfig,
        *,
        compute: Compute,
        data: DataConfig,
        companions: Mapping[str, FrozenModel],
    ) -> DarTokenizerTask:
        if model.image_size != data.image_size:
            raise ValueError(
                f"config.data.image_size={data.image_size} must equal "
                f"config.model.image_size={model.image_size}"
            )
        return DarTokenizerTask(model, loss, compute)

    def make_pipeline(
        self,
        model: FunctionalModel,
        params: Params,
        *,
        companions: Mapping[str, ModelPipeline],
        class_names: Sequence[str] = (),
        mesh: Mesh | None = None,
    ) -> TokenizerPipeline:
        return TokenizerPipeline(model, params, class_names=class_names, mesh=mesh)

    def from_reference(
        self, checkpoint: Checkpoint, model: TokenizerConfig
    ) -> tuple[TokenizerConfig, Params, Sequence[str]]:
        if checkpoint.config is not None:
            logging.info("Taking the model's config from the checkpoint")
            model = dar.tokenizer_config(checkpoint.config)
        model = dar.with_head_of(checkpoint.state_dict, model)
        params = dar.tokenizer_params(checkpoint.state_dict, model)
        return model, params, dar.UNUSED_TOKENIZER_KEYS

    def to_reference(self, params: Params, model: TokenizerConfig) -> dict[str, Any]:
        return dar.tokenizer_state_dict(params, model)

    def programs(self, task: DarTokenizerTask, mesh: Mesh, images: int) -> Iterator[Program]:
        yield flow_program(task.model, mesh, images)


def flow_program(model: FunctionalModel[Tokenizer], mesh: Mesh, images: int) -> Program:
    """The last step of the flow decoder, from all tokens."""
    model = dataclasses.replace(model, compute=model.compute.of_decoding())
    config, split = model.config, over_all_devices(mesh)
    size = (images, config.image_size, config.image_size, 3)
    step = functools.partial(sampler.decode_indices, model, start_step=config.num_steps - 1)
    shape, dtype = (images, config.num_tokens), jnp.int32
    if not config.codebook_size:
        shape, dtype = (*shape, config.code_dim), jnp.float32
    arguments = (
        sampling_params(model, mesh),
        jax.ShapeDtypeStruct(shape, dtype, sharding=split),
        jax.ShapeDtypeStruct(size, jnp.float32, sharding=split),
    )
    return Program("flow step", jax.jit(step), arguments, {}, images)
