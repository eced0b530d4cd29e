"""Names of config files: the user's own come first, then those that the package brings along."""

import sys

import pytest

from dar_jax.common import config_files
from tests.architecture_test import ROOT


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working directory that is not a checkout."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("argument", ["mnist.py", "mnist.py:dar", "configs/mnist.py:dar"])
def test_name_without_a_file_means_the_packages_own(argument):
    assert config_files.find(argument) == f"{ROOT}/configs/{argument.removeprefix('configs/')}"


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("argument", ["none.py:dar", "other/mnist.py", "", "mnist"])
def test_what_is_no_name_of_the_package_stays(argument):
    assert config_files.find(argument) == argument


@pytest.mark.parametrize("address", ["gs://bucket/mnist.py", "s3://bucket/mnist.py:dar"])
def test_config_file_in_a_bucket_is_refused(address):
    with pytest.raises(ValueError, match=f"--config={address}: no .* here: mount the bucket"):
        config_files.find(address)


def test_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mnist.py").touch()
    assert config_files.find("mnist.py:dar") == "mnist.py:dar"


@pytest.mark.parametrize(("argument", "folder"), [("own/a.py", "own"), ("mnist.py", None)])
def test_configs_import_neighbours_and_the_packages(tmp_path, monkeypatch, argument, folder):
    """Whatever else is called `configs` where the command is run."""
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "configs", raising=False)
    config_files.find(argument)
    neighbours = f"{tmp_path}/{folder}" if folder else f"{ROOT}/configs"
    assert sys.modules["configs"].__path__ == [neighbours, f"{ROOT}/configs"]
