"""Eight CPU devices, exact matrix products and checked shapes, set before anything is imported.

And a stand-in for torchvision, which fits few versions of torch and which nothing here calls.
"""

import importlib.machinery
import os
import sys
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # -m gpu wants JAX_PLATFORMS=cuda
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # no program of an earlier run

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook("dar_jax", "beartype.beartype")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)  # most of the time is compilation

TORCHVISION = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.transforms.v2",
)


@pytest.fixture
def stub_torchvision(monkeypatch):
    """Let packages that import torchvision at their top be imported without it."""
    for name in TORCHVISION:
        module = mock.MagicMock(__path__=[])
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
