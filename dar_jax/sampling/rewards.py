"""Rewards that users write: a Python file with a function of images."""

import functools
import pathlib
import runpy
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dar_jax.common import digests
from dar_jax.common.typing import Array

NAME = "reward"


def load_reward(path: str) -> Callable[[Array, Array], Array]:
    """Return the jitted `reward(images, labels) -> [B]` of a file, which runs once.

    A file that has changed since is another one.

    Raises:
        ValueError: there is no such file or function, or the file fails; from the function, if it
            fails or returns something else than a number for each image.
    """
    if not pathlib.Path(path).is_file():
        raise ValueError(f"search.reward={path!r} is neither likelihood, classifier nor a file")
    return _load(path, digests.of_file(path))


@functools.cache
def _load(path: str, digest: str) -> Callable[[Array, Array], Array]:
    try:
        function = runpy.run_path(path).get(NAME)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} fails: {_line(error)}") from error
    if not callable(function):
        raise ValueError(f"{path} has no function {NAME}(images, labels)")
    jitted = jax.jit(function)

    def judge(images: Array, labels: Array) -> Array:
        try:
            rewards = jitted(images, labels)
        except (Exception, SystemExit) as error:
            raise ValueError(f"{path} fails: {_line(error)}") from error
        if getattr(rewards, "shape", None) != images.shape[:1]:
            raise ValueError(
                f"{path}: {NAME} returns {jax.tree.map(jnp.shape, rewards)} for images "
                f"{images.shape}, and not one number for each: {images.shape[:1]}"
            )
        if jnp.iscomplexobj(rewards):
            raise ValueError(f"{path}: {NAME} returns {rewards.dtype}, and not real numbers")
        return rewards

    return judge


def _line(error: BaseException) -> str:
    """Say in a line what went wrong."""
    first, *_ = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first}"
