"""Sampling with both D-AR models: labels -> tokens, tokens -> image, and the two interleaved.

Each group of tokens conditions one step of the flow decoder, so image and tokens grow together:
after group g the solver takes the steps whose windows are complete, and the jump to t = 1 from
there is a preview (D-AR section 3.4). All functions take one key per image and are deterministic
given it; they run compiled programs and never wait for the device.

In-painting imposes the known pixels on the path after every step: there
x_t = t * known + (1 - t) * noise, with the noise that the run starts from.
"""

import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from dar_jax.common.batches import one_ahead
from dar_jax.common.compiled import call, compile_once
from dar_jax.common.image import resize_bicubic
from dar_jax.common.pictures import Images
from dar_jax.common.typing import Any, Array, Float, Int, Params, PRNGKeys
from dar_jax.flow import solvers
from dar_jax.flow.path import interpolate
from dar_jax.flow.times import shifted_grid
from dar_jax.models.dar import conditioning
from dar_jax.models.dar.draws import generate_indices
from dar_jax.models.dar.llama import Llama
from dar_jax.models.dar.options import DarSampling
from dar_jax.models.dar.tokenizer import Tokenizer, TokenizerConfig, step_starts
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.nn.layout import in_parts
from dar_jax.sampling import autoregressive

NOISE_STREAM = 2**31 - 1
"""Folded into an image's key for its initial noise; token n folds in n."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class DarPreview(Images):
    """An image after some of the tokens.

    Attributes:
        step: denoising steps taken.
        num_tokens: tokens known.
        images: float32 [B, H, W, 3], clipped to [-1, 1].
        indices: int32 [B, num_tokens].
    """

    step: int
    num_tokens: int
    images: Any  # arrays, but for shapes where programs are only recorded
    indices: Any


class Known(NamedTuple):
    """What in-painting keeps.

    Attributes:
        images: float32 [B, H, W, 3] in [-1, 1].
        mask: bool [B, H, W], True where the pixel is known.
    """

    images: Array | np.ndarray
    mask: Array | np.ndarray


@functools.partial(jax.jit, static_argnames="size")
def initial_noise(rngs: PRNGKeys, size: tuple[int, int]) -> Float[Array, "B H W 3"]:
    """Draw every image's noise from its own key."""

    def draw(rng: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(rng, NOISE_STREAM), (*size, 3))

    return jax.vmap(draw)(rngs)


def steps_of_groups(config: TokenizerConfig, num_steps: int, num_groups: int) -> int:
    """Number of leading steps whose windows lie within the first `num_groups` groups.

    Raises:
        ValueError: no such number of groups, or not even the first step's window is complete.
    """
    if not 1 <= num_groups <= config.num_groups:
        raise ValueError(f"num_groups={num_groups} must be in 1..{config.num_groups}")
    known = group_boundaries(config)[num_groups - 1]
    complete = sum(start + config.window <= known for start in step_starts(config, num_steps))
    if complete == 0:
        raise ValueError(
            f"num_groups={num_groups} gives {known} tokens, but the first step needs "
            f"{config.window}: use more groups"
        )
    return complete


def decode_indices(
    model: FunctionalModel[Tokenizer],
    params: Params,
    indices: Int[Array, "B N"] | Float[Array, "B N C"],
    noise: Float[Array, "B H W 3"],
    *,
    solver: str = "adams_bashforth2",
    num_steps: int | None = None,
    start_step: int = 0,
    stop_step: int | None = None,
    start_image: Float[Array, "B H W 3"] | None = None,
    known: Known | None = None,
    microbatch: int | None = None,
) -> solvers.Solution:
    """Decode tokens to images in [-1, 1] (not clipped), with the preview after every step.

    Args:
        model: the tokenizer.
        params: its parameters.
        indices: all N tokens, or a prefix that covers the windows of all steps; codes [B, N, C] of
            a model without a codebook.
        noise: initial noise, which also sets the size.
        solver: see `flow.solvers`.
        num_steps: steps of the grid; None takes the model's.
        start_step: first step that is taken, e.g. for editing an image (SDEdit).
        stop_step: step after the last one that is taken; None runs to the end.
        start_image: where `start_step` starts from, noised to its time; None is pure noise.
        known: pixels to keep.
        microbatch: images that the flow decoder sees at a time, a divisor of B; None is all.
    """
    config: TokenizerConfig = model.config
    num_steps = num_steps or config.num_steps
    stop_step = num_steps if stop_step is None else stop_step
    times = shifted_grid(num_steps, config.decoder.time_shift)[start_step : stop_step + 1]
    starts = step_starts(config, num_steps)[start_step:stop_step]
    x = noise
    if start_image is not None:
        t = jnp.full(len(noise), times[0])
        x = interpolate(start_image * config.decoder.data_std, noise, t)
    solution = solvers.Solution(x, x[None][:0])
    if starts:
        with model.decoding(params) as tokenizer:
            condition = tokenizer.condition_from_indices(indices)
            windows = jnp.stack([condition[:, start : start + config.window] for start in starts])
            solution = solvers.integrate(
                _velocity(tokenizer, microbatch),
                x,
                times,
                windows,
                solver=solver,
                constraint=constraint(known, noise, config.decoder.data_std),
            )
    return jax.tree.map(lambda x: to_image(x, known, config), solution)


def _velocity(tokenizer: Tokenizer, microbatch: int | None) -> Callable[..., Array]:
    """Return the velocity as the solvers want it, evaluated on `microbatch` images at a time."""

    def velocity(x: Array, t: Array, window: Array) -> Array:
        return tokenizer.velocity(x, t, window).velocity

    return in_parts(velocity, microbatch)


def constraint(
    known: Known | None, noise: Float[Array, "B H W 3"], data_std: float
) -> solvers.Constraint | None:
    """Impose the known pixels on the path from their noise to them."""
    if known is None:
        return None

    def impose(x: Array, t: Array) -> Array:
        return jnp.where(
            known.mask[..., None], interpolate(jnp.asarray(known.images) * data_std, noise, t), x
        )

    return impose


def to_image(
    x: Float[Array, "*steps B H W 3"], known: Known | None, config: TokenizerConfig
) -> Array:
    """Scale data to images; known pixels are taken as they are, not as rounding leaves them."""
    image, size = x / config.decoder.data_std, config.output_size
    if known is not None:
        image = jnp.where(known.mask[..., None], known.images, image)
    is_larger = size and max(image.shape[-3:-1]) > size
    return resize_bicubic(image, (size, size)) if is_larger else image


def stream(
    prior: FunctionalModel[Llama],
    prior_params: Params,
    tokenizer: FunctionalModel[Tokenizer],
    tokenizer_params: Params,
    condition: Array,
    rngs: PRNGKeys,
    sampling: DarSampling,
    *,
    prefix: Int[Array, "B K"] | None = None,
    key_mask: Array | None = None,
    draft: tuple[FunctionalModel[Llama], Params] | None = None,
    known: Known | None = None,
    microbatch: int | None = None,
) -> Iterator[DarPreview]:
    """Return the previews after every group of tokens; the last one is the image.

    By the time a preview is handed out, the work for the next one is under way. Without a mesh,
    the programs are compiled side by side. The arguments are those of `generate_indices` and
    `decode_indices`.
    """

    def work(run: Callable[..., Any]) -> Iterator[DarPreview]:
        groups = generate_indices(
            prior,
            prior_params,
            condition,
            rngs,
            sampling,
            prefix=prefix,
            boundaries=group_boundaries(tokenizer.config),
            key_mask=key_mask,
            draft=draft,
            run=run,
        )
        flow = (tokenizer, tokenizer_params, groups, rngs, sampling)
        return previews(*flow, known=known, microbatch=microbatch, run=run)

    if isinstance(rngs.sharding, SingleDeviceSharding):
        shapes = str(jax.tree.map(jnp.shape, (condition, prefix, key_mask, known)))
        compile_once(work, (prior, draft and draft[0], tokenizer, sampling, microbatch, shapes))
    return one_ahead(work(call))


def previews(
    tokenizer: FunctionalModel[Tokenizer],
    tokenizer_params: Params,
    groups: Generator[Int[Array, "B n"], Int[Array, "B n"] | None, None],
    rngs: PRNGKeys,
    sampling: DarSampling,
    *,
    known: Known | None = None,
    microbatch: int | None = None,
    run: Callable[..., Any] = call,
) -> Generator[DarPreview, Int[Array, "B n"] | None, None]:
    """Take the steps whose windows are complete after each group of tokens; see `stream`.

    Groups are those of `preview_groups`. What is sent back says which rows to go on with, here and
    in `groups`.
    """
    config = tokenizer.config
    noise = run(initial_noise, rngs, (config.image_size,) * 2)
    num_steps = sampling.steps(config)
    coefficients = solvers.coefficients(sampling.solver, num_steps)
    times = shifted_grid(num_steps, config.decoder.time_shift)
    starts = step_starts(config, num_steps)
    condition = conditioning.start(tokenizer, rngs)
    state, step, num_tokens = run(solvers.start, noise), 0, 0
    image = parents = None
    while True:
        try:
            indices = groups.send(parents)
        except StopIteration:
            return
        start, num_tokens = num_tokens, indices.shape[1]
        new = run(autoregressive.tokens_between, indices, start=start, stop=num_tokens)
        condition = run(conditioning.extend, tokenizer, tokenizer_params, new, condition, start)
        parents, before = None, step
        while step < num_steps and starts[step] + config.window <= num_tokens:
            state, image = run(
                _flow_step,
                tokenizer,
                tokenizer_params,
                noise,
                known,
                state,
                condition.tokens,
                starts[step],
                times[step : step + 2],
                coefficients.select(step),
                microbatch=microbatch,
            )
            step += 1
        if step > before or (image is not None and num_tokens == config.num_tokens):
            parents = yield DarPreview(step, num_tokens, image, indices)
            if parents is not None:
                kept = (state, condition, image)
                state, condition, image = autoregressive.take(kept, parents)


@functools.partial(jax.jit, static_argnames=("model", "microbatch"))
def _flow_step(
    model: FunctionalModel[Tokenizer],
    params: Params,
    noise: Float[Array, "B H W 3"],
    known: Known | None,
    state: solvers.SolverState,
    condition: Float[Array, "B N D"],
    start: Int[Array, ""] | int,
    times: Float[Array, "2"] | Float[np.ndarray, "2"],
    coefficients: solvers.Coefficients,
    *,
    microbatch: int | None,
) -> tuple[solvers.SolverState, Float[Array, "B height width 3"]]:
    """Advance one step on the window from `start` on; return the state and the preview."""
    config, data_std = model.config, model.config.decoder.data_std
    with model.decoding(params) as tokenizer:
        state, preview = solvers.step(
            _velocity(tokenizer, microbatch),
            state,
            times[0],
            times[1],
            jax.lax.dynamic_slice_in_dim(condition, start, config.window, axis=1),
            coefficients,
            constraint(known, noise, data_std),
        )
    return state, jnp.clip(to_image(preview, known, config), -1.0, 1.0)


def steps_after(config: TokenizerConfig, num_steps: int) -> tuple[int, ...]:
    """Denoising steps that can be taken in all after 1, 2, ... groups of tokens."""
    starts = step_starts(config, num_steps)
    return tuple(
        sum(start + config.window <= known for start in starts)
        for known in group_boundaries(config)
    )


def preview_groups(config: TokenizerConfig, num_steps: int) -> tuple[int, ...]:
    """Numbers of groups after which there is a preview: another one, or the image at the end.

    Of few steps the last may need no token of the last groups.
    """
    ends = steps_after(config, num_steps)
    return tuple(
        group
        for group, (before, end) in enumerate(zip((0, *ends), ends, strict=False), 1)
        if end > before or group == len(ends)
    )


def group_boundaries(config: TokenizerConfig) -> tuple[int, ...]:
    """Number of tokens after each group; all N after the last."""
    return tuple(config.num_tokens * (g + 1) // config.num_groups for g in range(config.num_groups))
