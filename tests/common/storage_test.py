"""Addresses: those that are not read are refused in one line, before anything is written."""

import os
import pathlib
import re
import socket
import subprocess
import sys
from unittest import mock

import pytest

from dar_jax import config as config_lib
from dar_jax.common import digests, model_dir, storage
from dar_jax.common.files import read_regular, replacing, write_json
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


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("gs://bucket/run", "needs gcsfs, which is not installed; run pip install 'dar-jax.gcs.'"),
        ("gs://", "expected gs://BUCKET/DIR"),
        ("gs:/bucket/run", "expected gs://BUCKET/DIR"),
        ("GS://bucket/run", "no gs:// here"),
    ],
)
def test_address_of_a_bucket_that_cannot_be_used_is_refused(address, message, monkeypatch):
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"--workdir={address}[: ].*{message}"):
        storage.to_path(address, "--workdir")


def test_what_is_read_from_a_bucket_and_what_has_to_be_mounted(monkeypatch):
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: name)
    values = {"tokenizer": "gs://bucket/tokenizer", "train": {"init_from": "gs://bucket/run"}}
    values["data"] = {"path": "gs://bucket/data", "classes": "gs://bucket/classes.json"}
    values["data"]["references"] = "gs://bucket/references.jsonl"
    values["evaluate"] = {"reference": "gs://bucket/a.npz", "images": "gs://bucket/b.npz"}
    storage.check_config(values, "config")
    for block, key in (("sample", "prompts"), ("sample", "inpaint_image"), ("convert", "source")):
        with pytest.raises(ValueError, match=r"mount the bucket \(gcsfuse BUCKET DIR\)"):
            storage.check_config({block: {key: "gs://bucket/x"}}, "config")
    storage.check_config({"convert": {"source": "gs://bucket/x", "to": "torch"}}, "config")


@pytest.fixture(params=["local", "bucket"])
def directory(request, tmp_path):
    if request.param == "local":
        return tmp_path
    return request.getfixturevalue("in_bucket")


def test_file_is_created_once_grows_and_is_found(directory):
    assert storage.create(directory / "a", "first") and not storage.create(directory / "a", "2nd")
    for line in (b"1\n", b"2\n"):
        storage.append(directory / "lines", line)
    storage.make_directory(directory / "below")
    write_json(directory / "below" / "b.json", {"c": 1})
    assert read_regular(directory / "a", 5) == b"first"
    assert read_regular(directory / "lines", 4) == b"1\n2\n"
    with pytest.raises(OSError, match="more than 3"):
        read_regular(directory / "lines", 3)
    with pytest.raises(FileNotFoundError):
        read_regular(directory / "none", 3)
    names = [p.relative_to(directory).as_posix() for p in storage.files_below(directory)]
    assert names == ["a", "below/b.json", "lines"]
    assert {path.name for path in storage.entries(directory)} == {"a", "below", "lines"}
    storage.delete_tree(directory / "below")
    assert not (directory / "below").exists() and storage.entries(directory / "below") == []


def test_look_at_a_bucket_leaves_nothing_though_an_earlier_one_was_killed(in_bucket):
    (in_bucket / f".writable-{socket.gethostname()}").write_text("")
    storage.check_writable(in_bucket)
    assert storage.entries(in_bucket) == []


def test_failed_write_leaves_what_was_there(directory):
    storage.create(directory / "a", "first")

    def fail():
        with replacing(directory / "a") as temporary:
            temporary.write_text("half of")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert read_regular(directory / "a", 5) == b"first"
    assert [path.name for path in storage.entries(directory)] == ["a"]


def test_digests_find_damage(directory):
    storage.create(directory / "a", "first")
    storage.make_directory(directory / "below")
    storage.create(directory / "below" / "b", "second")
    digests.write(directory)
    assert digests.find_damage(directory) == ""
    (directory / "below" / "b").write_text("other")
    assert digests.find_damage(directory) == "the content of below/b has changed"
    (directory / "below" / "b").unlink()
    assert digests.find_damage(directory) == "below/b is missing"


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


def test_upload_whose_session_the_bucket_has_lost_begins_anew(emulator, in_bucket, tmp_path):
    (tmp_path / "large").write_bytes(os.urandom(6 * 2**20))  # in more than one request
    system, lost = storage._connect(), []
    call = type(system)._call

    async def losing(self, method, path, *arguments, **options):
        if "upload_id=" in path and method == "POST" and not lost:
            lost.append(path)
            emulator.kill()
            emulator.start()
        return await call(self, method, path, *arguments, **options)

    with mock.patch.object(type(system), "_call", losing):
        storage.upload(tmp_path / "large", in_bucket / "large")
        (in_bucket / "small").write_text("in one request")
    assert len(lost) == 1
    assert (in_bucket / "large").read_bytes() == (tmp_path / "large").read_bytes()
    assert (in_bucket / "small").read_text() == "in one request"
