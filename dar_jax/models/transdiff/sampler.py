"""Sampling latents with TransDiff: passes of one solver run each, in pieces that can be looked at.

The one-step model makes one pass, an MRAR model one per reference: each pass starts from the *same*
initial noise (as the reference does), draws step noise of its own, and attends to the class and to
the latents of the passes before; the last one is the result. Everything is deterministic given one
key per image.

With guidance an image has two rows, its class and the null class, which share references, state
and noise; see `flow.guidance`.
"""

import functools
import itertools
import math
from collections.abc import Generator, Sequence
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.common.typing import Array, Float, Int, Params, PRNGKeys
from dar_jax.flow import guidance, solvers
from dar_jax.models.kl_vae import KlVae, KlVaeConfig
from dar_jax.models.transdiff.model import TransDiff, TransDiffConfig
from dar_jax.models.transdiff.options import TransDiffSampling
from dar_jax.nn.attention import KVCache
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.sampling import autoregressive

INITIAL_STREAM, STEP_STREAM = 0, 1
"""Folded into an image's key for its initial noise and for that of its steps."""
NUM_PREVIEWS = 4
"""Previews of a one-step model, its image included, where their number is left open."""


def check_vae(config: TransDiffConfig, vae: KlVaeConfig, where: str) -> None:
    """Raise ValueError unless the model is one of latents of the autoencoder at `where`."""
    if config.channels != vae.latent_channels:
        raise ValueError(
            f"config.model.channels={config.channels}, but the autoencoder in {where} has "
            f"latent_channels={vae.latent_channels}"
        )


def check_image_size(config: TransDiffConfig, vae: KlVaeConfig, image_size: int) -> None:
    """Raise ValueError unless images of this size have latents of the model's size."""
    expected = config.latent_size * vae.stride
    if image_size != expected:
        raise ValueError(
            f"config.data.image_size={image_size}, but latents of {config.latent_size}x"
            f"{config.latent_size} with a stride of {vae.stride} are of {expected} pixels"
        )


def steps_per_preview(config: TransDiffConfig, num_steps: int) -> int:
    """Steps between previews where none are asked for: a pass of MRAR, else a quarter of it."""
    return num_steps if config.num_references > 1 else math.ceil(num_steps / NUM_PREVIEWS)


class LatentPreview(NamedTuple):
    """Latents on their way.

    Attributes:
        step_pass: which pass they are from, counted from 0.
        step: steps taken in it.
        latents: float32 [B, h, w, C]: the data that the last velocity pointed to, or, after the
            last step of a pass, its result.
    """

    step_pass: int
    step: int
    latents: Array


@functools.partial(jax.jit, static_argnames="config")
def initial_noise(rngs: PRNGKeys, config: TransDiffConfig) -> Float[Array, "B h w C"]:
    """Draw every image's noise from its own key."""
    shape = (config.latent_size, config.latent_size, config.channels)
    return _draw(rngs, INITIAL_STREAM, shape)


def run(
    model: FunctionalModel[TransDiff],
    params: Params,
    labels: Int[Array, " B"],
    noise: Float[Array, "B h w C"],
    step_noise: PRNGKeys | Float[Array, "passes steps B h w C"],
    config: TransDiffSampling,
    *,
    stops: Sequence[int] = (),
) -> Generator[LatentPreview, Int[Array, "images n"] | None, None]:
    """Yield the latents at the steps `stops` of every pass and at its end.

    What is sent back, if anything, says which rows go on, each with the step noise of its place;
    see `autoregressive.take`.

    Args:
        model: the model.
        params: its parameters.
        labels: classes.
        noise: initial noise of every pass.
        step_noise: a key per image, or the noise of the stochastic steps itself.
        config: the solver's.
        stops: increasing numbers of steps after which latents are looked at.
    """
    references, num_steps = noise[:, None][:, :0], config.num_steps
    ends = (0, *(stop for stop in stops if 0 < stop < num_steps), num_steps)
    for step_pass in range(model.config.num_references):
        guided = config.scale_of(step_pass) != 1
        caches = condition_caches(model, params, labels, references, guided=guided)
        state, latents = solvers.start(noise), noise
        for part in itertools.pairwise(ends):
            state, latents = denoise(
                model, params, caches, state, step_noise, config, step_pass=step_pass, part=part
            )
            parents = yield LatentPreview(step_pass, part[1], latents)
            if parents is None:
                continue
            # Passes start from one noise, which stays with its references.
            rows = (noise, references, state, latents)
            noise, references, state, latents = autoregressive.take(rows, parents)
            if part[1] < num_steps:
                caches = jax.vmap(autoregressive.take, (0, None))(caches, parents)
        references = jnp.concatenate([references, latents[:, None]], axis=1)


def denoise(
    model: FunctionalModel[TransDiff],
    params: Params,
    caches: KVCache,
    state: solvers.SolverState,
    step_noise: PRNGKeys | Float[Array, "passes steps B h w C"],
    config: TransDiffSampling,
    *,
    step_pass: int,
    part: tuple[int, int],
) -> tuple[solvers.SolverState, Float[Array, "B h w C"]]:
    """Take the steps of a part of a pass, whose condition has these keys and values; see `run`.

    Returns:
        The state, and the latents that the last velocity points to: of the last step, its result.
    """
    start, stop = part
    scale = config.scale_of(step_pass)
    state, latents = advance(
        model,
        params,
        caches,
        state,
        config.grid[start : stop + 1],
        config.coefficients.select(slice(start, stop)),
        _noise_of(step_noise, step_pass, start, config),
        scale=None if scale == 1 else scale,
        interval=config.guided_times,
    )
    return state, state.x if stop == config.num_steps else latents


@functools.partial(jax.jit, static_argnames=("vae", "microbatch"))
def decode(
    vae: FunctionalModel[KlVae],
    params: Params,
    latents: Float[Array, "B h w C"],
    *,
    microbatch: int | None = None,
) -> Float[Array, "B H W 3"]:
    """Decode scaled latents to images, clipped to [-1, 1]."""
    samples = latents / vae.config.latent_scale
    with vae.decoding(params) as bound:
        return jnp.clip(bound.decode(samples, microbatch=microbatch), -1.0, 1.0)


@functools.partial(jax.jit, static_argnames=("model", "guided"))
def condition_caches(
    model: FunctionalModel[TransDiff],
    params: Params,
    labels: Int[Array, " B"],
    references: Float[Array, "B k h w C"],
    *,
    guided: bool,
) -> KVCache:
    """Keys and values of the condition of the next image, which all steps read."""
    if guided:
        null = jnp.full_like(labels, model.config.num_classes)
        labels = einops.rearrange([labels, null], "two b -> (b two)")
        references = jnp.repeat(references, 2, axis=0)
    module = model.bind(params)
    condition = module.condition(labels, references)
    return module.decoder.keys_values(condition)


class StepKeys(NamedTuple):
    """Keys of a pass [B], and the index of the first step of a part."""

    rngs: Array
    first: Array | int


@functools.partial(jax.jit, static_argnames=("model", "interval"))
def advance(
    model: FunctionalModel[TransDiff],
    params: Params,
    caches: KVCache,
    state: solvers.SolverState,
    times: Float[Array, " times"] | Float[np.ndarray, " times"],
    coefficients: solvers.Coefficients,
    noise: StepKeys | Float[Array, "steps B h w C"] | None,
    *,
    scale: float | Array | None,
    interval: tuple[float, float],
) -> tuple[solvers.SolverState, Float[Array, "B h w C"]]:
    """Take some steps; return the state and the data that the last velocity points to.

    All guidance scales share one program; None is no guidance, and caches without the null rows.
    """
    velocity = model.bind(params).decoder.velocity
    if scale is not None:
        velocity = guidance.guide(velocity, scale, interval)

    def draw(keys: StepKeys, index: Array) -> Array:
        return _draw(keys.rngs, keys.first + index, state.x.shape[1:])

    if isinstance(noise, StepKeys):
        step_noise = functools.partial(draw, noise)
    else:
        step_noise = None if noise is None else noise.__getitem__
    return solvers.advance(
        lambda x, t, _: velocity(x, t, caches),
        state,
        times,
        None,
        coefficients,
        step_noise=step_noise,
    )


def _noise_of(
    step_noise: Array, step_pass: int, start: int, config: TransDiffSampling
) -> StepKeys | Array | None:
    """Noise of the steps of a pass from `start` on; there is none in the last step."""
    if config.solver != solvers.EULER_MARUYAMA or start == config.num_steps - 1:
        return None
    if jnp.issubdtype(step_noise.dtype, jax.dtypes.prng_key):
        return StepKeys(_fold(step_noise, STEP_STREAM + step_pass), start)
    return step_noise[step_pass, start:]


@jax.jit
def _fold(rngs: PRNGKeys, stream: Array | int) -> PRNGKeys:
    return jax.vmap(jax.random.fold_in, (0, None))(rngs, stream)


def _draw(rngs: PRNGKeys, stream: Array | int, shape: tuple[int, ...]) -> Float[Array, "B ..."]:
    return jax.vmap(lambda rng: jax.random.normal(rng, shape))(_fold(rngs, stream))
