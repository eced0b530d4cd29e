"""The programs that a model spends its life in, with abstract arguments: what `compile` needs."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dar_jax.common.typing import Params
from dar_jax.flow import solvers
from dar_jax.models.dar import sampler, work
from dar_jax.models.dar.llama import Llama
from dar_jax.models.dar.tokenizer import Tokenizer, TokenizerConfig
from dar_jax.models.transdiff import sampler as latent_sampler
from dar_jax.models.transdiff import work as transdiff_work
from dar_jax.models.transdiff.model import TransDiff
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.nn.stack import unstack
from dar_jax.parallel import sharding
from dar_jax.sampling import autoregressive
from dar_jax.sampling.logits import SamplingConfig
from dar_jax.tasks.base import Task
from dar_jax.tasks.dar_prior import DarPriorTask
from dar_jax.tasks.dar_tokenizer import DarTokenizerTask
from dar_jax.tasks.transdiff import TransDiffTask
from dar_jax.training import config as train_config
from dar_jax.training import state as state_lib
from dar_jax.training import step as step_lib

CODES = "codes"
"""The data source whose batches hold codes instead of pixels."""
GUIDED = 2.0
"""A guidance scale; all make the same program."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A jitted function with abstract arguments that know their shardings.

    Attributes:
        name: for the report.
        function: what `jax.jit` returned.
        arguments: positional arguments.
        options: keyword arguments.
        images: images of one run, of all devices.
        model_flops: of one run, of all devices.
    """

    name: str
    function: Callable
    arguments: tuple
    options: dict[str, Any]
    images: int
    model_flops: float


def jobs_of(
    settings: train_config.Settings, task: Task, mesh: Mesh, images_per_device: int
) -> Iterator[Job]:
    """The train step, then what the sampler runs over and over; nothing is computed."""
    images = images_per_device * mesh.size
    yield _train_job(settings, task, mesh)
    if isinstance(task, DarPriorTask):
        yield _decode_job(task.model, task.tokenizer.config, mesh, images)
        yield _flow_job(task.tokenizer, mesh, images)
    elif isinstance(task, DarTokenizerTask):
        yield _flow_job(task.model, mesh, images)
    elif isinstance(task, TransDiffTask):
        yield from _latent_jobs(task.model, mesh, images)


def _train_job(settings: train_config.Settings, task: Task, mesh: Mesh) -> Job:
    size, accumulation = settings.data.batch_size, settings.train.accumulation
    step_lib.check_accumulation(size, accumulation, mesh)
    state = state_lib.abstract_state(task, settings.optimizer, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = step_lib.make_train_step(task, settings.optimizer, shardings, **settings.step_options)
    frozen = task.abstract_frozen()
    frozen = _abstract(frozen, sharding.fsdp_sharding(frozen, mesh))
    batch = _abstract(_batch(settings, task), sharding.batch_sharding(mesh))
    return Job("train step", step, (state, batch, frozen), {}, size, size * task.flops_per_image)


def _batch(settings: train_config.Settings, task: Task) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of pixels, or of codes (one crop each) if the data are codes."""
    size, references = settings.data.batch_size, settings.data.num_references
    label = jax.ShapeDtypeStruct((size,), jnp.int32)
    if isinstance(task, DarPriorTask) and settings.data.source == CODES:
        shape = (size, 1, task.model.config.num_tokens)
        return {"codes": jax.ShapeDtypeStruct(shape, jnp.uint16), "label": label}
    group = () if references == 1 else (references,)
    shape = (size, *group, *(settings.data.image_size,) * 2, 3)
    return {"pixels": jax.ShapeDtypeStruct(shape, jnp.uint8), "label": label}


def _decode_job(
    model: FunctionalModel[Llama], tokenizer: TokenizerConfig, mesh: Mesh, images: int
) -> Job:
    """Decoding the last group of tokens with guidance: the one with the longest caches."""
    config, model = model.config, model.unstacked()
    stop = config.num_tokens
    start = stop - stop // tokenizer.num_groups
    decoder = autoregressive.Decoder(model, config.condition_tokens, SamplingConfig(), guided=True)

    def state_before() -> autoregressive.DecodingState:
        caches = model.bind(model.init(jax.random.key(0))).empty_caches(2 * images)
        caches = autoregressive.grow(caches, config.condition_tokens + start - 1)
        return autoregressive.DecodingState(jnp.zeros(images, jnp.int32), caches, None)

    rngs = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), images))
    split = _over_all_devices(mesh)
    arguments = (
        decoder,
        _cast_and_replicated(model, mesh),
        _abstract(jax.eval_shape(state_before), split),
        _abstract(rngs, split),
        _abstract(jax.ShapeDtypeStruct((stop,), jnp.float32), sharding.replicated(mesh)),
    )
    flops = images * work.prior_sampling_flops(config) * (stop - start) / stop
    options = {"start": start, "stop": stop}
    return Job("decode a group", autoregressive.decode, arguments, options, images, flops)


def _flow_job(model: FunctionalModel[Tokenizer], mesh: Mesh, images: int) -> Job:
    """The last step of the flow decoder, from all tokens."""
    config = model.config
    split = _over_all_devices(mesh)
    indices = jax.ShapeDtypeStruct((images, config.num_tokens), jnp.int32, sharding=split)
    noise = jax.ShapeDtypeStruct(
        (images, *(config.image_size,) * 2, 3), jnp.float32, sharding=split
    )
    step = functools.partial(sampler.decode_indices, model, start_step=config.num_steps - 1)
    arguments = (_cast_and_replicated(model, mesh), indices, noise)
    flops = float(images * (work.flow_step_flops(config) + work.condition_flops(config)))
    return Job("flow step", jax.jit(step), arguments, {}, images, flops)


def _latent_jobs(model: FunctionalModel[TransDiff], mesh: Mesh, images: int) -> Iterator[Job]:
    """The condition of the last pass, and one of its steps: those with the most tokens."""
    config, split = model.config, _over_all_devices(mesh)
    references, tokens = config.num_references - 1, config.condition_tokens
    params = _cast_and_replicated(model, mesh)
    latent = (config.latent_size, config.latent_size, config.channels)
    labels = jax.ShapeDtypeStruct((images,), jnp.int32, sharding=split)
    before = jax.ShapeDtypeStruct((images, references, *latent), jnp.float32, sharding=split)
    encode = functools.partial(latent_sampler.condition_caches, model, guided=True)
    flops = transdiff_work.encode_flops(config, references)
    flops = 2.0 * images * (flops + transdiff_work.keys_values_flops(config, tokens))
    arguments = (params, labels, before)
    yield Job("condition", jax.jit(encode), arguments, {}, images, flops)

    caches = jax.eval_shape(encode, *arguments)
    state = jax.eval_shape(solvers.start, jax.ShapeDtypeStruct((images, *latent), jnp.float32))
    solver = latent_sampler.SolverConfig()
    arguments = (
        model,
        params,
        _abstract(caches, NamedSharding(mesh, PartitionSpec(None, mesh.axis_names))),
        _abstract(state, split),
        solver.grid[-2:],
        solver.coefficients.select(slice(-1, None)),
        None,
    )
    options = {"scale": GUIDED, "interval": solver.guidance_times}
    flops = 2.0 * images * transdiff_work.step_flops(config, tokens)
    yield Job("flow step", latent_sampler.advance, arguments, options, images, flops)


def _cast_and_replicated(model: FunctionalModel, mesh: Mesh) -> Params:
    """Abstract parameters in the compute dtype, as sampling holds them."""
    stacked = dataclasses.replace(model, compute=dataclasses.replace(model.compute, stacked=True))

    def create() -> Params:
        params = stacked.init(jax.random.key(0))
        params = jax.tree.map(lambda leaf: leaf.astype(model.compute.jnp_dtype), params)
        return params if model.compute.stacked else unstack(params)

    return _abstract(jax.eval_shape(create), sharding.replicated(mesh))


def _over_all_devices(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def _abstract(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of a tree with one sharding, or a tree of them."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        shardings,
    )
