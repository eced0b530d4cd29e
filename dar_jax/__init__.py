"""Autoregressive-diffusion image generation in JAX.

`from_pretrained` loads a model directory and returns its pipeline; `__version__` is that of the
installed package. Names are imported when they are first asked for, so that `import dar_jax` costs
nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dar_jax.kinds.loading import from_pretrained
    from dar_jax.models.dar.options import DarSampling
    from dar_jax.models.transdiff.options import TransDiffSampling
    from dar_jax.nn.compute import Compute
    from dar_jax.pipelines.dar import DarPipeline
    from dar_jax.pipelines.transdiff import TransDiffPipeline
    from dar_jax.sampling.search import Search

    __version__: str

__all__ = [
    "Compute",
    "DarPipeline",
    "DarSampling",
    "Search",
    "TransDiffPipeline",
    "TransDiffSampling",
    "from_pretrained",
]
_MODULES = {
    "Compute": "nn.compute",
    "DarPipeline": "pipelines.dar",
    "DarSampling": "models.dar.options",
    "Search": "sampling.search",
    "TransDiffPipeline": "pipelines.transdiff",
    "TransDiffSampling": "models.transdiff.options",
    "from_pretrained": "kinds.loading",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"dar_jax.{_MODULES[name]}"), name)
    if name == "__version__":
        return importlib.import_module("dar_jax.common.version").version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
