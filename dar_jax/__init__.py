"""Autoregressive-diffusion image generation in JAX.

`from_pretrained` loads a model directory. It is imported when it is first asked for, so that
`import dar_jax` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dar_jax.kinds.loading import from_pretrained

__all__ = ["from_pretrained"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("dar_jax.kinds.loading"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
