"""Addresses: those that are not read are refused in one line, before anything is written."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from dar_jax import config as config_lib
from dar_jax.common import model_dir, storage
from dar_jax.common.files import write_json
from dar_jax.parallel.workdir import open_workdir

ROOT = pathlib.Path(__file__).parents[2]
REFUSED = {
    "s3://bucket/run": "mount the bucket",
    "S3://bucket/run": "mount the bucket",
    "s3:/bucket/run": "mount the bucket",
    "az://bucket/run": "az:// is not known",
    "file:///run": "give the path alone",
    "https://host/run": "https:// is not known",
}
PATHS = ("data.path", "train.init_from", "sample.prefix_image", "evaluate.reference", "loss.lpips")


@pytest.mark.parametrize("address", REFUSED)
def test_unknown_scheme_is_refused_and_no_folder_named_after_it(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (
        lambda: storage.check_path(address, "--workdir"),
        lambda: open_workdir(address),
        lambda: model_dir.locate(address),
        lambda: write_json(address, {}),
    ):
        with pytest.raises(ValueError, match=f"{re.escape(address)}: .*{REFUSED[address]}"):
            use()
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("key", PATHS)
def test_config_names_the_key_of_a_refused_address(key):
    config = config_lib.defaults()
    block, _, name = key.partition(".")
    values = {**config.to_dict(), "loss": {}}
    values[block][name] = "s3://bucket/x"
    with pytest.raises(ValueError, match=f"--config.{key}=s3://bucket/x: "):
        storage.check_config(values, "config")


def test_every_item_of_a_list_is_looked_at():
    with pytest.raises(ValueError, match="--config.originals=az://b/2: "):
        storage.check_config({"originals": ("test:3", "az://b/2")}, "config")
    with pytest.raises(ValueError, match="az://b/2: "):
        storage.check_path("hf://a/b/c.pt,az://b/2", "source", known=("hf",))


@pytest.mark.parametrize("path", ["runs/first", "test:3", "/a:b/c", "tfds:mnist", "a,b", "x:y/z"])
def test_local_paths_and_names_are_left_alone(path):
    storage.check_path(path, "path")


def test_command_refuses_before_it_writes(tmp_path):
    command = (sys.executable, "-m", "dar_jax.main", "--config=mnist.py")
    done = subprocess.run(
        [*command, "--workdir=s3://bucket/run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "--workdir=s3://bucket/run: no s3:// here: mount the bucket" in done.stderr
    assert not [*tmp_path.iterdir()]
