"""What every config begins with; the defaults are those of the dataclasses of its blocks."""

from collections.abc import Mapping
from typing import TypeVar

from dar_jax.config import block
from dar_jax.config import defaults as base

__all__ = ["base", "block", "variant"]

T = TypeVar("T")


def variant(name: str, variants: Mapping[str, T]) -> T:
    """Return the variant called `name`.

    Raises:
        ValueError: there is none.
    """
    if name not in variants:
        raise ValueError(f"unknown config variant {name!r}; available: {', '.join(variants)}")
    return variants[name]
