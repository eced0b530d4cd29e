"""Names and sizes of trees of arrays."""

import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import traverse_util

from dar_jax.common.typing import Params

SEPARATOR = "/"


def flatten(params: Params) -> dict[str, Any]:
    """Return `{"encoder/blocks/attention/q/kernel": leaf, ...}`."""
    flat = traverse_util.flatten_dict(params)
    return {SEPARATOR.join(map(str, path)): leaf for path, leaf in flat.items()}


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Invert `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep=SEPARATOR)


def num_parameters(params: Any) -> int:
    """Total number of elements of a tree of (possibly abstract) arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def tree_bytes(tree: Any) -> int:
    """Total number of bytes of a tree of (possibly abstract) arrays."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
