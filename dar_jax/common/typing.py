"""Array aliases. Axis letters: B batch, H W grid, C channels, N tokens, M keys, D width."""

from typing import Any

from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, Shaped, UInt8

Params = dict[str, Any]
"""A plain nested dict of arrays: the parameters of one module."""

PRNGKeys = Key[Array, " B"]
"""One typed key per image."""

__all__ = [
    "Any",
    "Array",
    "Bool",
    "Float",
    "Int",
    "PRNGKeyArray",
    "PRNGKeys",
    "Params",
    "Shaped",
    "UInt8",
]
