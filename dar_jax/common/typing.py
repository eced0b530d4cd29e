"""Array aliases. Axis letters: B batch, H W grid, C channels, N tokens, M keys, D width."""

from typing import Any, TypeVar

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, Shaped, UInt8

Params = dict[str, Any]
"""A plain nested dict of arrays: the parameters of one module."""

PRNGKeys = Key[Array, " B"]
"""One typed key per image."""

AnyArray = TypeVar("AnyArray", Array, np.ndarray)
"""An array on a device or on the host; what is made of it is of the same kind."""

__all__ = [
    "Any",
    "AnyArray",
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
