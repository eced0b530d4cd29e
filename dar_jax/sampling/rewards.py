"""Rewards that users write: a Python file with a function of images."""

import functools
import pathlib
import runpy
from collections.abc import Callable

import jax

from dar_jax.common import digests
from dar_jax.common.typing import Array

NAME = "reward"


def load_reward(path: str) -> Callable[[Array, Array], Array]:
    """Return the jitted `reward(images, labels) -> [B]` of a file, which runs once.

    A file that has changed since is another one.

    Raises:
        ValueError: there is no such file or function, or the file fails.
    """
    if not pathlib.Path(path).is_file():
        raise ValueError(f"search.reward={path!r} is neither likelihood, classifier nor a file")
    return _load(path, digests.of_file(path))


@functools.cache
def _load(path: str, digest: str) -> Callable[[Array, Array], Array]:
    try:
        function = runpy.run_path(path).get(NAME)
    except Exception as error:
        raise ValueError(f"{path} fails: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError(f"{path} has no function {NAME}(images, labels)")
    return jax.jit(function)
