"""Checkpoints without torch: `.safetensors`, and what is answered to anything else."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dar_jax.common import hub
from dar_jax.common.files import write_safetensors
from dar_jax.convert.checkpoints import read_checkpoint

WEIGHTS = {"a": np.float32([1, 2, 3]), "b.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}


def test_safetensors_round_trip_is_bitwise(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    path = tmp_path / "weights.safetensors"
    write_safetensors(path, {**WEIGHTS, "b.weight": WEIGHTS["b.weight"].T.copy().T})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    checkpoint = read_checkpoint(str(path))
    assert checkpoint.state_dict.keys() == WEIGHTS.keys()
    for name, array in WEIGHTS.items():
        np.testing.assert_array_equal(checkpoint.state_dict[name], array)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64])
def test_safetensors_become_float32_without_prefixes(tmp_path, dtype):
    arrays = {f"module._orig_mod.{name}": array.astype(dtype) for name, array in WEIGHTS.items()}
    arrays["module.positions"] = np.arange(3)
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors")
    state_dict = read_checkpoint(str(tmp_path / "a.safetensors")).state_dict
    assert state_dict.pop("positions").dtype == np.int64
    assert all(array.dtype == np.float32 for array in state_dict.values())
    assert {name: array.tolist() for name, array in state_dict.items()} == {
        name: array.tolist() for name, array in WEIGHTS.items()
    }


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(arrays, path, *_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        write_safetensors(tmp_path / "a.safetensors", WEIGHTS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kept", [0, 4, -5])
def test_truncated_safetensors_are_refused(tmp_path, kept):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, WEIGHTS)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged or no safetensors file"):
        read_checkpoint(str(path))


def test_missing_file_directory_and_unknown_suffix_are_refused(tmp_path):
    (tmp_path / "weights.h5").write_bytes(b"")
    for source, message in (
        (tmp_path / "none.pt", r"none\.pt is not a file"),
        (tmp_path, "is not a file"),
        (tmp_path / "weights.h5", r"suffixes \.pt, \.pth, \.ckpt, \.safetensors"),
    ):
        with pytest.raises(ValueError, match=message):
            read_checkpoint(str(source))


def test_pickle_without_torch_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"dar-jax\[convert\]"):
        read_checkpoint(str(tmp_path / "a.pt"))


def test_hub_address_is_downloaded(tmp_path, monkeypatch):
    write_safetensors(tmp_path / "a.safetensors", WEIGHTS)
    asked = []

    def download(address):
        asked.append(address)
        return str(tmp_path / "a.safetensors")

    monkeypatch.setattr(hub, "download_file", download)
    address = "hf://owner/name/a.safetensors"
    assert read_checkpoint(address).state_dict.keys() == WEIGHTS.keys()
    assert asked == [address]
