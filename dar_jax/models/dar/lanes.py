"""Images at different groups in one batch: continuous batching of both D-AR models.

A *lane* holds one image that is being drawn. Programs take the numbers of the lanes that they are
for, and each lane's own position: lanes begin, go on and end on their own. A lane gets the keys
that `models.dar.sampler` would give its image and the same operations, so what is drawn there
depends on its own seed, index, class and options only; bit for bit, as long as the batch is of one
size. All lanes are guided; a scale of 1 is a product more.

The last lane is a spare one: a batch that is not full is padded with its number, and nobody reads
what is drawn there.
"""

import dataclasses
import functools
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.common.typing import Any, Array, Float, Int, Params
from dar_jax.flow import solvers
from dar_jax.flow.times import shifted_grid
from dar_jax.models.dar import conditioning
from dar_jax.models.dar.draws import embed_rows
from dar_jax.models.dar.llama import Llama
from dar_jax.models.dar.options import DarSampling
from dar_jax.models.dar.sampler import (
    Known,
    constraint,
    initial_noise,
    preview_groups,
    steps_after,
    to_image,
)
from dar_jax.models.dar.tokenizer import Tokenizer, step_starts
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.sampling.autoregressive import TokenDecoder, grow


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What all lanes share; static in compiled programs.

    Attributes:
        prior: unstacked, over classes.
        tokenizer: with groups of equal size.
        sampling: how images are drawn; guidance and temperature are each lane's own.
    """

    prior: FunctionalModel[Llama]
    tokenizer: FunctionalModel[Tokenizer]
    sampling: DarSampling

    def __post_init__(self):
        config = self.tokenizer.config
        if self.prior.config.caption_dim is not None:
            raise ValueError("the model draws from captions; lanes are for models of classes")
        if self.prior.config.max_guidance:
            raise ValueError("the model is distilled; lanes guide by two rows: use its teacher")
        if config.num_tokens % config.num_groups:
            raise ValueError(
                f"the {config.num_tokens} tokens of an image make no {config.num_groups} groups of "
                "equal size, which lanes need"
            )
        *_, before, end = (0, *self.steps_after)
        if before == end:
            raise ValueError(
                f"num_steps={self.sampling.steps(config)} leaves the last tokens of an image "
                f"unused, which lanes cannot: take {config.num_steps}"
            )
        if self.sampling.search.method:
            raise ValueError(
                f"search.method={self.sampling.search.method!r} draws the candidates of an image "
                "together, which lanes cannot: leave it empty"
            )

    @property
    def num_groups(self) -> int:
        return self.tokenizer.config.num_groups

    @property
    def group_size(self) -> int:
        return self.tokenizer.config.num_tokens // self.num_groups

    @property
    def steps_after(self) -> tuple[int, ...]:
        """Denoising steps that can be taken in all after 1, 2, ... groups."""
        config = self.tokenizer.config
        return steps_after(config, self.sampling.steps(config))

    @property
    def preview_groups(self) -> tuple[int, ...]:
        """Numbers of groups after which there is another preview; the last one is the image."""
        config = self.tokenizer.config
        return preview_groups(config, self.sampling.steps(config))


class Lanes(NamedTuple):
    """State of L lanes, the spare one included.

    Attributes:
        label: class, int32 [L].
        rng: data of the image's key, uint32 [L, 2].
        scales: guidance scale of every token, float32 [L, N].
        temperature: float32 [L].
        tokens: int32 [L, N], those that are known and then others.
        caches: of the prior, [L, 2, ...], see `Llama.empty_caches`: conditional and unconditional.
        condition: of the flow decoder.
        noise: float32 [L, H, W, 3].
        flow: state of the solver.
        known: pixels that are kept; none where the mask is False.
    """

    label: Array
    rng: Array
    scales: Array
    temperature: Array
    tokens: Array
    caches: Any
    condition: conditioning.KnownCondition
    noise: Array
    flow: solvers.SolverState
    known: Known


class Asked(NamedTuple):
    """What B images are to be; on the host.

    Attributes:
        label: class, int32 [B].
        seed: uint32 [B].
        index: of the image among those of its seed, int32 [B].
        scales: guidance scale of every token, float32 [B, N].
        temperature: float32 [B].
        known: pixels to keep, float32 [B, H, W, 3] in [-1, 1], and bool [B, H, W].
    """

    label: np.ndarray
    seed: np.ndarray
    index: np.ndarray
    scales: np.ndarray
    temperature: np.ndarray
    known: Known


def empty(drawing: Drawing, num_lanes: int) -> Lanes:
    """Return lanes of which none has begun."""
    config, prior = drawing.tokenizer.config, drawing.prior
    keys = jax.random.split(jax.random.key(0), num_lanes)

    def empty_caches() -> Any:
        caches = prior.bind(prior.init(jax.random.key(0))).empty_caches(2 * num_lanes)
        return _by_image(grow(caches, config.num_tokens))

    caches = jax.tree.map(lambda c: jnp.zeros(c.shape, c.dtype), jax.eval_shape(empty_caches))
    image = jnp.zeros((num_lanes, config.image_size, config.image_size, 3))
    lanes = Lanes(
        label=jnp.zeros(num_lanes, jnp.int32),
        rng=jax.random.key_data(keys),
        scales=jnp.ones((num_lanes, config.num_tokens)),
        temperature=jnp.ones(num_lanes),
        tokens=jnp.zeros((num_lanes, config.num_tokens), jnp.int32),
        caches=caches,
        condition=conditioning.start(drawing.tokenizer, keys),
        noise=image,
        flow=solvers.start(image),
        known=Known(image, jnp.zeros(image.shape[:3], bool)),
    )
    return jax.tree.map(jnp.copy, lanes)  # what is given up must not be shared


@functools.partial(jax.jit, donate_argnames="lanes")
def begin(lanes: Lanes, at: Int[Array, " B"], asked: Asked) -> Lanes:
    """Begin images in the lanes `at`."""

    def key(seed: Array, index: Array) -> Array:
        return jax.random.fold_in(jax.random.key(seed), index)

    rngs = jax.vmap(key)(jnp.asarray(asked.seed), jnp.asarray(asked.index))
    noise = initial_noise(rngs, asked.known.images.shape[1:3])
    return _put(
        lanes,
        at,
        label=asked.label,
        rng=jax.random.key_data(rngs),
        scales=asked.scales,
        temperature=asked.temperature,
        noise=noise,
        flow=solvers.start(noise),
        known=asked.known,
    )


@functools.partial(jax.jit, static_argnames="drawing", donate_argnames="lanes")
def decode_group(
    drawing: Drawing,
    params: tuple[Params, Params],
    lanes: Lanes,
    at: Int[Array, " B"],
    first: Int[Array, " B"],
) -> Lanes:
    """Draw the tokens `first` .. `first` + group size - 1 in the lanes `at`, and condition on them.

    Args:
        drawing: static part.
        params: of the prior, for decoding, and of the tokenizer.
        lanes: are given up for the new ones.
        at: numbers of the lanes.
        first: token of each lane to begin with; those before are known.
    """
    lane = _take(lanes, at)
    sampling = dataclasses.replace(drawing.sampling.tokens, temperature=lane.temperature)
    prior, (prior_params, tokenizer_params) = drawing.prior, params
    decoder = TokenDecoder(prior, prior.config.condition_tokens, sampling, guided=True)
    module = prior.bind(prior_params)
    condition = embed_rows(prior, prior_params, lane.label, guided=True)
    rngs = jax.random.wrap_key_data(lane.rng)

    def draw(decoder: TokenDecoder, rng: Array, logits: Array, index: Array, scales: Array):
        return decoder.draw(rng[None], logits, index, scales)[0]

    def body(offset: Array, state: tuple[Array, Any]) -> tuple[Array, Any]:
        tokens, caches = state
        index = first + offset
        last = jnp.take_along_axis(tokens, jnp.maximum(index - 1, 0)[:, None], axis=1)
        x = module.token_embed(decoder.rows(last))
        x = jnp.where(decoder.rows(index == 0)[:, None, None], condition, x)
        x, caches = module.extend(x, caches, decoder.rows(index))
        logits = einops.rearrange(module.head(x[:, 0]), "(b two) v -> b two v", two=2)
        token = jax.vmap(draw)(decoder, rngs, logits, index, lane.scales)
        return tokens.at[jnp.arange(len(at)), index].set(token), caches

    state = (lane.tokens, _by_row(lane.caches))
    tokens, caches = jax.lax.fori_loop(0, drawing.group_size, body, state)

    def extend(tokens: Array, known: conditioning.KnownCondition, first: Array) -> Any:
        group = jax.lax.dynamic_slice_in_dim(tokens, first, drawing.group_size)
        known = jax.tree.map(lambda leaf: leaf[None], known)
        known = conditioning.extend(drawing.tokenizer, tokenizer_params, group[None], known, first)
        return jax.tree.map(lambda leaf: leaf[0], known)

    condition = jax.vmap(extend)(tokens, lane.condition, first)
    return _put(lanes, at, tokens=tokens, caches=_by_image(caches), condition=condition)


@functools.partial(jax.jit, static_argnames="drawing", donate_argnames="lanes")
def flow_step(
    drawing: Drawing,
    params: Params,
    lanes: Lanes,
    at: Int[Array, " B"],
    step: Int[Array, " B"],
) -> tuple[Lanes, Float[Array, "B height width 3"], Int[Array, "B N"]]:
    """Take the denoising step `step` of each of the lanes `at`.

    Returns:
        The lanes, the previews in [-1, 1], and all tokens, of which those that are known are
        meant.
    """
    config, data_std = drawing.tokenizer.config, drawing.tokenizer.config.decoder.data_std
    num_steps = drawing.sampling.steps(config)
    table = solvers.coefficients(drawing.sampling.solver, num_steps)
    times = jnp.asarray(shifted_grid(num_steps, config.decoder.time_shift), jnp.float32)
    starts = jnp.asarray(step_starts(config, num_steps))
    lane = _take(lanes, at)

    def window(tokens: Array, start: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(tokens, start, config.window)

    with drawing.tokenizer.decoding(params) as tokenizer:
        windows = jax.vmap(window)(lane.condition.tokens, starts[step])
        velocity = tokenizer.velocity(lane.flow.x, times[step], windows).velocity

    def advance(flow: Any, velocity: Array, step: Array, known: Known, noise: Array) -> Any:
        flow, velocity, known, noise = jax.tree.map(
            lambda leaf: leaf[None], (flow, velocity, known, noise)
        )
        coefficients = jax.tree.map(lambda values: jnp.asarray(values)[step], table)
        moved = solvers.step(
            lambda x, t, velocity: velocity,
            flow,
            times[step],
            times[step + 1],
            velocity,
            coefficients,
            constraint(known, noise, data_std),
        )
        return jax.tree.map(lambda leaf: leaf[0], moved)

    flow, preview = jax.vmap(advance)(lane.flow, velocity, step, lane.known, lane.noise)
    images = jnp.clip(to_image(preview, lane.known, config), -1.0, 1.0)
    return _put(lanes, at, flow=flow), images, lane.tokens


def _take(tree: Any, at: Array) -> Any:
    return jax.tree.map(lambda leaf: leaf[at], tree)


def _put(lanes: Lanes, at: Array, **new: Any) -> Lanes:
    """Write these fields of the lanes `at`; the others are not touched."""

    def put(old: Any, new: Any) -> Any:
        return jax.tree.map(lambda leaf, rows: leaf.at[at].set(rows), old, new)

    return lanes._replace(**{name: put(getattr(lanes, name), rows) for name, rows in new.items()})


def _by_image(caches: Any) -> Any:
    return jax.tree.map(lambda c: einops.rearrange(c, "(b two) ... -> b two ...", two=2), caches)


def _by_row(caches: Any) -> Any:
    return jax.tree.map(lambda c: einops.rearrange(c, "b two ... -> (b two) ..."), caches)
