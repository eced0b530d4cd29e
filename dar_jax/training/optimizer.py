"""AdamW or Muon with warm-up, decay of the rate, clipping and weight decay on matrices only.

    rate(step) = learning_rate * min(1, step / warmup_steps)
    then, if decay_end > 0, to final_learning_rate from decay_start to decay_end, and flat; linear,
    or along half a cosine

`step` is 0-based (the number of completed steps, skipped ones included), so with warm-up the first
update has rate 0, as in the D-AR training scripts. The tokenizer's recipe warms up and stays
constant; the prior's is constant up to 300k and linear up to 360k.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from dar_jax.common.typing import Any, Params
from dar_jax.parallel import sharding
from dar_jax.tasks.base import DISCRIMINATOR

OPTIMIZERS = ("adamw", "muon")
MAX_STEPS = 2**31 - 1
"""Steps are counted in 32 bits."""
DECAY_SHAPES = ("linear", "cosine")
MUON_UPDATE_RMS = 0.2
"""Size of Muon's updates at learning rate 1, which makes its rates those of AdamW (Liu et al. 2025,
arXiv:2502.16982)."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer of one run; the defaults are those of D-AR's tokenizer script."""

    name: str = "adamw"
    """"adamw", as published; or "muon", which needs fewer steps: orthogonalised momentum for the
    kernels, AdamW for the rest."""
    learning_rate: float = 2e-4
    warmup_steps: int = 500
    decay_start: int = 0
    decay_end: int = 0
    """0: the rate stays constant after the warm-up."""
    decay_shape: str = "linear"
    """"linear" or "cosine"."""
    final_learning_rate: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Of matrices, see `weight_decay_mask`; "muon" leaves embeddings and convolutions without."""
    undecayed: str = ""
    """Regular expression: parameters whose name starts so have no weight decay, e.g. "decoder/"."""
    trained: str = ""
    """Regular expression: only parameters whose name starts so are trained, and the discriminator
    where there is one; empty: all."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; larger ones are scaled down to it."""
    ema_decay: float = 0.999
    """Decay of the moving average of the parameters, updated every step; 0: no average."""

    def __post_init__(self):
        if self.name not in OPTIMIZERS:
            raise ValueError(f"name {self.name!r} must be one of {', '.join(OPTIMIZERS)}")
        for name in (
            *("learning_rate", "final_learning_rate", "weight_decay"),
            *("warmup_steps", "decay_start", "decay_end"),
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} is negative")
        for name in ("warmup_steps", "decay_start", "decay_end"):
            if getattr(self, name) > MAX_STEPS:
                raise ValueError(f"{name} {getattr(self, name)} is more than {MAX_STEPS}")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not in [0, 1)")
        for name in ("eps", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} is not positive")
        if self.decay_end and self.decay_shape == "cosine" and not self.learning_rate:
            raise ValueError("learning_rate 0.0 has no cosine decay; use decay_shape='linear'")
        if self.decay_shape not in DECAY_SHAPES:
            raise ValueError(
                f"decay_shape {self.decay_shape!r} must be one of {', '.join(DECAY_SHAPES)}"
            )
        for name in ("undecayed", "trained"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is not a regular expression: {error}"
                ) from error
        if self.decay_end and not self.warmup_steps <= self.decay_start < self.decay_end:
            raise ValueError(
                f"decay from step {self.decay_start} to {self.decay_end} must start after the "
                f"{self.warmup_steps} warm-up steps and before its end"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay {self.ema_decay} is not in [0, 1); 0 turns it off")


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Return the function from the number of completed steps to the learning rate."""
    peak = config.learning_rate
    rate = optax.constant_schedule(peak)
    if config.warmup_steps:
        rate = optax.linear_schedule(0.0, peak, config.warmup_steps)
    if not config.decay_end:
        return rate
    decay_steps = config.decay_end - config.decay_start
    if config.decay_shape == "cosine":
        decay = optax.cosine_decay_schedule(peak, decay_steps, config.final_learning_rate / peak)
    else:
        decay = optax.linear_schedule(peak, config.final_learning_rate, decay_steps)
    return optax.join_schedules([rate, decay], [config.decay_start])


def weight_decay_mask(params: Params, undecayed: str = "") -> Params:
    """Return the tree of booleans that is true for matrices: weights of two or more dimensions.

    The layer axis of stacked blocks does not count: a stacked bias [layers, D] is not a matrix.
    Nor does the null caption, which stays as it was drawn.

    Args:
        params: parameters.
        undecayed: names that start so are false.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf.ndim - sharding.layer_axes(path) >= 2
            and path[-1].key != "null_caption"
            and not _starts(path, undecayed)
        ),
        params,
    )


def check_names(config: OptimizerConfig, params: Params) -> None:
    """Raise ValueError if `trained` or `undecayed` is the beginning of no parameter's name."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for name in ("trained", "undecayed"):
        pattern = getattr(config, name)
        if pattern and not any(_starts(path, pattern) for path in paths):
            begin = ", ".join(f"{part}/" for part in dict.fromkeys(path[0].key for path in paths))
            raise ValueError(
                f"config.optimizer.{name}={pattern!r} is how no parameter's name starts; they "
                f"start with {begin}"
            )


def _starts(path: tuple[Any, ...], pattern: str) -> bool:
    """Whether a parameter's name starts with a pattern; the empty pattern is none."""
    return bool(pattern) and re.match(pattern, sharding.leaf_name(path)) is not None


def trained_gradients(config: OptimizerConfig, grads: Params) -> Params:
    """Set the gradients of parameters that are not trained to zero, but for the discriminator's."""
    if not config.trained:
        return grads

    def trained(path: tuple[Any, ...], leaf: Any) -> Any:
        is_trained = path[0].key == DISCRIMINATOR or _starts(path, config.trained)
        return leaf if is_trained else jnp.zeros_like(leaf)

    return jax.tree_util.tree_map_with_path(trained, grads)


def muon_dimensions(params: Any) -> Any:
    """Return which axes of every kernel are [in, out]; None for all other leaves."""

    def dimensions(path, leaf):
        first = sharding.layer_axes(path)
        if path[-1].key != "kernel" or leaf.ndim - first != 2:
            return None
        return contrib.MuonDimensionNumbers(reduction_axis=first, output_axis=first + 1)

    return jax.tree_util.tree_map_with_path(dimensions, params)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Return clipping by global norm followed by the optimizer (decay scaled by the rate).

    Parameters below `DISCRIMINATOR`, if there are any, have their own: AdamW of the same numbers
    without warm-up, clipped by itself.
    """
    trained = _trained_only(config, _optimizer(config))
    steady = dataclasses.replace(config, name="adamw", warmup_steps=0)
    pair = optax.partition({False: trained, True: _optimizer(steady)}, _is_discriminator)

    def of(params: Any) -> optax.GradientTransformation:
        return pair if DISCRIMINATOR in params else trained

    return optax.GradientTransformation(
        lambda params: of(params).init(params),
        lambda updates, state, params=None: of(params).update(updates, state, params),
    )


def _trained_only(
    config: OptimizerConfig, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Leave what is not trained as it is, without optimizer state."""
    if not config.trained:
        return optimizer

    def is_trained(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: _starts(path, config.trained), params
        )

    return optax.partition({True: optimizer, False: optax.set_to_zero()}, is_trained)


def _is_discriminator(params: Params) -> Params:
    return {name: name == DISCRIMINATOR for name in params}


def _optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    rate = learning_rate_schedule(config)
    mask = functools.partial(weight_decay_mask, undecayed=config.undecayed)
    if config.name == "muon":
        optimizer = contrib.muon(
            rate,
            eps=config.eps,
            weight_decay=config.weight_decay,
            weight_decay_mask=mask,
            adam_b1=config.b1,
            adam_b2=config.b2,
            muon_weight_dimension_numbers=muon_dimensions,
            consistent_rms=MUON_UPDATE_RMS,
        )
    else:
        optimizer = optax.adamw(
            rate,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=mask,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
