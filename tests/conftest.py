"""Eight CPU devices, exact matrix products and checked shapes, set before anything is imported.

Most of the time of the tests is compilation: programs are optimised less, in the processes that
tests start too, the dearest of XLA's code generators for CPUs is off (a third of the time), and a
program is not cut into parts that are compiled side by side (a fifth of it).

And a stand-in for torchvision, which fits few versions of torch and which nothing here calls.
"""

import importlib.machinery
import os
import sys
from unittest import mock

import jaxlib.version

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # -m gpu wants JAX_PLATFORMS=cuda
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
if jaxlib.version.__version_info__ < (0, 11):  # later ones may not know it, and abort
    options = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {options}"
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # no program of an earlier run

import jax
import jaxtyping
import pytest

jaxtyping.install_import_hook("dar_jax", "beartype.beartype")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")

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


def pytest_xdist_auto_num_workers():
    """One more than there are cores, which idle while a test waits for a process it started."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture
def unchecked():
    """No shape checks, as in production: the project's own messages come first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def stub_torchvision(monkeypatch):
    """Let packages that import torchvision at their top be imported without it."""
    for name in TORCHVISION:
        module = mock.MagicMock(__path__=[])
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(autouse=True)
def few_cores(monkeypatch):
    """Let no test start reading processes because it runs where there are cores for them."""
    monkeypatch.setattr("dar_jax.data.pipeline.usable_cores", lambda: 2)


def _emulator(scheme, tmp_path_factory):
    """A server of buckets for this process and those that it starts."""
    from tests.emulator import EMULATORS

    for name in EMULATORS[scheme].needs:
        pytest.importorskip(name, reason=EMULATORS[scheme].reason)
    server = EMULATORS[scheme](tmp_path_factory.mktemp("objects"))
    with mock.patch.dict(os.environ, server.variables):
        yield server
    server.close()


@pytest.fixture(scope="session")
def gs(tmp_path_factory):
    yield from _emulator("gs", tmp_path_factory)


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    yield from _emulator("s3", tmp_path_factory)


@pytest.fixture(scope="session", params=["gs", "s3"])
def emulator(request):
    """Each of the servers of buckets."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def in_bucket(emulator):
    """A folder of the test's own in a bucket."""
    from tests.emulator import folder_in

    return folder_in(emulator)


@pytest.fixture(params=["local", "gs", "s3"])
def anywhere(request, tmp_path):
    """A folder of the test's own, here and in buckets."""
    from tests.emulator import folder_in

    if request.param == "local":
        return tmp_path
    return folder_in(request.getfixturevalue(request.param))
