"""A stand-in for torchvision, which fits few versions of torch and which nothing here calls."""

import importlib.machinery
import sys
from unittest import mock

import pytest

MODULES = (
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
    for name in MODULES:
        module = mock.MagicMock(__path__=[])
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
