"""Addresses: those that are not read are refused in one line, before anything is written."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from dar_jax import config as config_lib
from dar_jax.common import addresses, model_dir, storage
from dar_jax.common.files import write_json
from dar_jax.parallel.workdir import open_workdir

ROOT = pathlib.Path(__file__).parents[2]
REFUSED = {
    "S3://bucket/run": "mount the bucket",
    "GS://bucket/run": "mount the bucket",
    "az://bucket/run": "az:// is not known",
    "file:///run": "give the path alone",
    "https://host/run": "https:// is not known",
}
PATHS = ("data.path", "train.init_from", "sample.prefix_image", "evaluate.reference", "loss.lpips")
READ = (
    *("tokenizer", "train.init_from", "data.path", "data.classes", "data.references"),
    *("evaluate.reference", "evaluate.images"),
)
MOUNTED = ("sample.prompts", "sample.inpaint_image", "convert.source")


@pytest.mark.parametrize("address", REFUSED)
def test_unknown_scheme_is_refused_and_no_folder_named_after_it(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (
        lambda: addresses.check_path(address, "--workdir"),
        lambda: open_workdir(address),
        lambda: model_dir.locate(address),
        lambda: write_json(address, {}),
    ):
        with pytest.raises(ValueError, match=f"{re.escape(address)}: .*{REFUSED[address]}"):
            use()
    assert not [*tmp_path.iterdir()]


def of_config(key, value):
    """A configuration of one key."""
    *block, name = key.split(".")
    return {block[0]: {name: value}} if block else {name: value}


@pytest.mark.parametrize("key", PATHS)
def test_config_names_the_key_of_a_refused_address(key):
    block, _, name = key.partition(".")
    values = {**config_lib.defaults().to_dict(), "loss": {}}
    values[block][name] = "az://bucket/x"
    with pytest.raises(ValueError, match=f"--config.{key}=az://bucket/x: "):
        addresses.check_config(values, "config")


def test_every_item_of_a_list_is_looked_at():
    with pytest.raises(ValueError, match="--config.originals=az://b/2: "):
        addresses.check_config({"originals": ("test:3", "az://b/2")}, "config")
    with pytest.raises(ValueError, match="az://b/2: "):
        addresses.check_path("hf://a/b/c.pt,az://b/2", "source", known=("hf",))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("gs://bucket/run", "needs gcsfs, which is not installed; run pip install 'dar-jax.gcs.'"),
        ("s3://bucket/run", "needs s3fs, which is not installed; run pip install 'dar-jax.s3.'"),
        ("gs://", "expected gs://BUCKET/DIR"),
        ("gs:/bucket/run", "expected gs://BUCKET/DIR"),
        ("s3:///run", "expected s3://BUCKET/DIR"),
        ("s3:/bucket/run", "expected s3://BUCKET/DIR"),
    ],
)
def test_address_of_a_bucket_that_cannot_be_used_is_refused(address, message, monkeypatch):
    monkeypatch.setattr(addresses.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"--workdir={address}[: ].*{message}"):
        storage.to_path(address, "--workdir")


@pytest.mark.parametrize(
    ("scheme", "mount"), [("gs", "gcsfuse BUCKET DIR"), ("s3", "mount-s3 BUCKET DIR")]
)
def test_what_is_read_from_a_bucket_and_what_has_to_be_mounted(scheme, mount, monkeypatch):
    monkeypatch.setattr(addresses.importlib.util, "find_spec", lambda name: name)
    for key in READ:
        addresses.check_config(of_config(key, f"{scheme}://bucket/x"), "config")
    for key in MOUNTED:
        with pytest.raises(ValueError, match=rf"mount the bucket \({mount}\)"):
            addresses.check_config(of_config(key, f"{scheme}://bucket/x"), "config")
    back = {"convert": {"source": f"{scheme}://bucket/x", "to": "torch"}}
    addresses.check_config(back, "config")


@pytest.mark.parametrize("path", ["runs/first", "test:3", "/a:b/c", "tfds:mnist", "a,b", "x:y/z"])
def test_local_paths_and_names_are_left_alone(path):
    addresses.check_path(path, "path")


def test_command_refuses_before_it_writes(tmp_path):
    command = (sys.executable, "-m", "dar_jax.main", "--config=mnist.py")
    done = subprocess.run(
        [*command, "--workdir=az://bucket/run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "--workdir=az://bucket/run: az:// is not known" in done.stderr
    assert not [*tmp_path.iterdir()]
