"""From logits to a token: temperature, top-k, top-p; and the guidance scale of every position."""

import dataclasses
import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.common.typing import Any, Array, Float, Int, PRNGKeys

MIN_TEMPERATURE = 1e-5
MIN_LINEAR_START = 1.001
"""A linear schedule "from 1" starts here: the reference decides by the first scale whether the
unconditional branch runs at all."""
SCHEDULES = ("linear", "cosine")
NO_TOKEN = -1
"""What is drawn of logits that are not finite: no model takes it for a token."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How a token is drawn from guided logits.

    A tree: compiled programs take any temperature, and are of one `top_k` and `top_p`.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens (and ties); 0 keeps all.
        top_p: keep the most likely tokens up to this total probability; 1 keeps all.
    """

    temperature: Any = 1.0
    top_k: int = dataclasses.field(default=0, metadata={"static": True})
    top_p: float = dataclasses.field(default=1.0, metadata={"static": True})

    def __post_init__(self):
        # What JAX builds inside and between compiled programs holds no number.
        if isinstance(self.temperature, numbers.Real) and not 0 <= float(self.temperature) < np.inf:
            raise ValueError(
                f"temperature={self.temperature} must be at least 0 (0 is greedy) and finite"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be at least 0 (0 is off)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1] (1 is off)")


def guidance_schedule(
    guidance_scale: float | int | Sequence[float | int],
    num_tokens: int,
    *,
    schedule: str = "linear",
    interval: int | Sequence[int] | None = None,
) -> Float[np.ndarray, " N"]:
    """Guidance scale of each of `num_tokens` positions, float32; 1 is no guidance.

    Args:
        guidance_scale: one constant scale, or (first, last) of a ramp.
        num_tokens: number of positions N.
        schedule: of the ramp over u = i / (N - 1): "linear" or "cosine", (1 - cos(pi u)) / 2.
        interval: (first, last) position that is guided, both included. A number k stands for
            (0, k + 1) (reference: `cfg_interval`, which counts decoding steps, the first of which
            makes the second token).

    Raises:
        ValueError: a scale below 1 (guidance extrapolates away from the unconditional logits),
            more than two scales, an unknown schedule or no such interval.
    """
    ends = tuple(np.ravel(guidance_scale))
    if len(ends) not in (1, 2):
        raise ValueError(f"guidance_scale={guidance_scale} must be one scale or (first, last)")
    first, last = ends[0], ends[-1]
    if not all(1 <= scale < np.inf for scale in ends):
        raise ValueError(
            f"guidance_scale={guidance_scale} must be at least 1 (1 is no guidance) and finite"
        )
    if schedule not in SCHEDULES:
        raise ValueError(f"guidance_schedule {schedule!r} must be one of {', '.join(SCHEDULES)}")
    if first == 1 and last > 1:
        first = MIN_LINEAR_START
    scales = np.linspace(first, last, num_tokens, dtype=np.float32)
    if schedule == "cosine":
        ramp = (1 - np.cos(np.pi * np.linspace(0, 1, num_tokens))) / 2
        scales = (first + (last - first) * ramp).astype(np.float32)
    if interval is not None:
        start, stop = _guided(interval, num_tokens)
        scales[:start] = scales[stop:] = 1.0
    return scales


def _guided(interval: int | Sequence[int], num_tokens: int) -> tuple[int, int]:
    """Return the first guided position, and the one after the last."""
    if isinstance(interval, int):
        if interval < 0:
            raise ValueError(f"guidance_interval={interval} must be at least 0")
        return 0, interval + 2
    start, last = interval[0], interval[-1]
    if len(interval) != 2 or not 0 <= start <= last < num_tokens:
        raise ValueError(
            f"guidance_interval={interval} must be (first, last) with "
            f"0 <= first <= last < {num_tokens}"
        )
    return start, last + 1


def guide(
    conditional: Float[Array, "*batch V"],
    unconditional: Float[Array, "*batch V"],
    scale: Float[Array, ""] | Float[Array, "*batch 1"],
) -> Float[Array, "*batch V"]:
    """Return `unconditional + scale * (conditional - unconditional)` (Ho & Salimans 2022)."""
    return unconditional + scale * (conditional - unconditional)


def filter_logits(logits: Float[Array, "B V"], *, top_k: int, top_p: float) -> Array:
    """Set the logits that top-k, then top-p, remove to -inf.

    Everything equal to the k-th largest value stays. Top-p keeps tokens, in falling order, until
    their total probability exceeds p, always including the one that crosses and at least one.
    """
    if top_k > 0:
        kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p < 1.0:
        order = jnp.argsort(logits, axis=-1, descending=True)
        ordered = jnp.take_along_axis(logits, order, axis=-1)
        cumulative = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
        removed = jnp.concatenate(
            [jnp.zeros_like(cumulative[:, :1], bool), cumulative[:, :-1] > top_p], axis=-1
        )
        ranks = jnp.argsort(order, axis=-1)
        logits = jnp.where(jnp.take_along_axis(removed, ranks, axis=-1), -jnp.inf, logits)
    return logits


def scale_and_filter(logits: Float[Array, "B V"], config: SamplingConfig) -> Array:
    """Logits of the distribution that tokens are drawn from."""
    logits = logits / jnp.maximum(config.temperature, MIN_TEMPERATURE)
    return filter_logits(logits, top_k=config.top_k, top_p=config.top_p)


def sample_token(
    rngs: PRNGKeys, logits: Float[Array, "B V"], config: SamplingConfig
) -> Int[Array, " B"]:
    """Draw one token per row with the row's own key; temperature 0 takes the arg-max.

    Of logits that are not finite it is `NO_TOKEN`.
    """
    drawn = jax.vmap(jax.random.categorical)(rngs, scale_and_filter(logits, config))
    greedy = jnp.argmax(logits, axis=-1)
    token = jnp.where(config.temperature == 0, greedy, drawn)
    return jnp.where(jnp.isfinite(logits).all(axis=-1), token, NO_TOKEN).astype(jnp.int32)
