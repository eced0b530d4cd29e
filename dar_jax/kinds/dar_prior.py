"""The Llama prior of D-AR over the tokens of a tokenizer: class labels to images."""

import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dar_jax.common.typing import Any, Params
from dar_jax.convert import dar
from dar_jax.convert.checkpoints import Checkpoint
from dar_jax.data import codes, encoded
from dar_jax.data.base import DataConfig
from dar_jax.kinds.base import Kind
from dar_jax.kinds.dar_runs import DarRuns
from dar_jax.kinds.dar_tokenizer import DarTokenizer, flow_program
from dar_jax.models.dar.decoding import decoding_params
from dar_jax.models.dar.llama import Llama, LlamaConfig
from dar_jax.models.dar.options import check_pair
from dar_jax.models.dar.tokenizer import TokenizerConfig
from dar_jax.models.text.encoder import TextEncoder
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.parallel import sharding
from dar_jax.performance.programs import Program, abstract, over_all_devices, sampling_params
from dar_jax.pipelines.dar import DarPipeline
from dar_jax.pipelines.dar_prior import PriorPipeline
from dar_jax.pipelines.dar_prompts import open_encoder_of
from dar_jax.sampling import autoregressive
from dar_jax.sampling.logits import SamplingConfig
from dar_jax.tasks.base import FrozenModel
from dar_jax.tasks.dar_prior import DarPriorTask

TOKENIZER = "tokenizer"


class DarPrior(Kind[LlamaConfig]):
    """See the module's docstring."""

    name = "dar_prior"
    noun = "a prior over tokens"
    module = Llama
    architecture = LlamaConfig
    pipeline = DarPipeline
    companions: ClassVar = {TOKENIZER: DarTokenizer.name}
    runs = DarRuns
    caches = (codes.CODES,)

    def task(
        self,
        model: LlamaConfig,
        loss: None,
        *,
        compute: Compute,
        data: DataConfig,
        companions: Mapping[str, FrozenModel],
    ) -> DarPriorTask:
        from_codes, model = self.reads_codes(data), self.with_text_digest(model, data)
        return DarPriorTask(model, companions[TOKENIZER], compute, from_codes=from_codes)

    def with_text_digest(self, model: LlamaConfig, data: DataConfig) -> LlamaConfig:
        """Note the text encoder that cached captions are of."""
        if model.caption_dim is None or not self.reads_codes(data):
            return model
        return dataclasses.replace(model, text_digest=codes.text_digest(data.path))

    def reads_codes(self, data: DataConfig) -> bool:
        """Whether batches hold codes that the tokenizer has made before."""
        return data.source == codes.CODES

    def make_pipeline(
        self,
        model: FunctionalModel,
        params: Params,
        *,
        companions: Mapping[str, Any],
        class_names: Sequence[str] = (),
        mesh: Mesh | None = None,
    ) -> DarPipeline:
        prior = PriorPipeline(model, params, mesh=mesh)
        return DarPipeline(prior, companions[TOKENIZER], class_names=class_names)

    def check_companion(
        self, model: LlamaConfig, name: str, companion: TokenizerConfig, where: str
    ) -> None:
        check_pair(model, companion, where)

    def check_data(self, model: LlamaConfig, data: DataConfig, paths: Mapping[str, str]) -> None:
        super().check_data(model, data, paths)
        check_captions(model, data)
        if self.reads_codes(data):
            encoded.check_model(data.path, codes.FORM, paths[TOKENIZER])
        if model.caption_dim is None:
            return
        if not self.reads_codes(data):
            raise ValueError(
                f"data.source={data.source!r}, but captions are encoded before training: write "
                "them with --mode=cache --config.cache.kind=codes, then train with "
                "--config.data.source=codes --config.data.path=DIR"
            )
        codes.check_captions(data.path, described(open_encoder_of(model)))

    def from_reference(
        self, checkpoint: Checkpoint, model: LlamaConfig
    ) -> tuple[LlamaConfig, Params, Sequence[str]]:
        params = dar.prior_params(checkpoint.state_dict, model)
        return model, params, dar.UNUSED_PRIOR_KEYS

    def to_reference(self, params: Params, model: LlamaConfig) -> dict[str, Any]:
        if model.max_guidance:
            raise ValueError(
                f"max_guidance={model.max_guidance}: the reference has no distilled priors; "
                "take the teacher"
            )
        return dar.prior_state_dict(params, model)

    def programs(self, task: DarPriorTask, mesh: Mesh, images: int) -> Iterator[Program]:
        yield _decode_program(task.model, task.tokenizer.config, mesh, images)
        yield flow_program(task.tokenizer, mesh, images)


def check_captions(model: LlamaConfig, data: DataConfig) -> None:
    """Raise ValueError unless model and data have both captions, or neither."""
    if data.captions != (model.caption_dim is not None):
        raise ValueError(
            f"config.model.caption_dim={model.caption_dim} and config.data.captions="
            f"{data.captions} do not fit: a model of captions has a width and needs captions; None "
            "and False are for classes"
        )


def described(encoder: TextEncoder) -> dict[str, Any]:
    """What a cache says of the features of captions, as JSON types."""
    return {
        codes.ENCODER: encoder.name,
        codes.DIGEST: encoder.digest,
        codes.LENGTH: encoder.num_tokens,
        codes.WIDTH: encoder.dim,
    }


def _decode_program(
    model: FunctionalModel[Llama], tokenizer: TokenizerConfig, mesh: Mesh, images: int
) -> Program:
    """Decoding the last group of tokens with guidance: the one with the longest caches."""
    config, model = model.config, model.unstacked()
    stop = config.num_tokens
    start = stop - stop // tokenizer.num_groups
    decoder = autoregressive.TokenDecoder(
        model, config.condition_tokens, SamplingConfig(), guided=not config.max_guidance
    )
    rows = images * (1 + decoder.guided)

    def state_before() -> autoregressive.DecodingState:
        caches = model.bind(model.init(jax.random.key(0))).empty_caches(rows)
        caches = autoregressive.grow(caches, config.condition_tokens + start - 1)
        return autoregressive.DecodingState(jnp.zeros((images, stop), jnp.int32), caches, None)

    rngs = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), images))
    split = over_all_devices(mesh)
    arguments = (
        decoder,
        sampling_params(
            model, mesh, functools.partial(decoding_params, weights=model.compute.decode_weights)
        ),
        abstract(jax.eval_shape(state_before), split),
        abstract(rngs, split),
        abstract(jax.ShapeDtypeStruct((stop,), jnp.float32), sharding.replicated(mesh)),
    )
    # Only a loop of known length can be counted.
    decode = jax.jit(
        inspect.unwrap(autoregressive.decode), static_argnames=("start", "stop", "num_slots")
    )
    num_slots = config.condition_tokens + stop - 1
    options = {"start": start, "stop": stop, "num_slots": num_slots}
    return Program("decode a group", decode, arguments, options, images)
