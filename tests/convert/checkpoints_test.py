"""Checkpoints without torch: `.safetensors`, and what is answered to anything else."""

import json
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
        (tmp_path / "weights.h5", r"suffixes \.pt, .*\.pth\.tar, \.safetensors"),
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


def test_safetensors_of_8_bit_floats_become_float32(tmp_path):
    """The header is written by hand: the library's NumPy side knows no such type."""
    values = np.float32([[1.5, -2.0], [0.25, 448.0]])
    data = values.astype(jnp.float8_e4m3fn).tobytes() + np.float32(3).tobytes()
    header = {
        "a": {"dtype": "F8_E4M3", "shape": [2, 2], "data_offsets": [0, 4]},
        "b": {"dtype": "F32", "shape": [], "data_offsets": [4, 8]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    state_dict = read_checkpoint(str(path)).state_dict
    np.testing.assert_array_equal(state_dict["a"], values)
    assert state_dict["a"].dtype == np.float32 and state_dict["b"] == 3


@pytest.mark.parametrize("folder", [".", "below"])
def test_shards_are_read_through_their_index(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    index = write_shards(tmp_path / folder)
    source = "model.safetensors.index.json" if folder == "." else str(index)
    assert read_checkpoint(source).state_dict.keys() == WEIGHTS.keys()


def write_shards(folder):
    folder.mkdir(exist_ok=True)
    places = {}
    for number, (name, array) in enumerate(WEIGHTS.items()):
        places[name] = f"model-0000{number}.safetensors"
        write_safetensors(folder / places[name], {f"module.{name}": array})
    index = folder / "model.safetensors.index.json"
    places = {f"module.{name}": place for name, place in places.items()}
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda i: (i.parent / "model-00001.safetensors").unlink(), "model-00001.* is missing"),
        (lambda i: i.write_text('{"weight_map": {"a": "../b.safetensors"}}'), "files beside it"),
        (lambda i: i.write_text('{"weight_map": {}}'), "not the index of a checkpoint"),
        (lambda i: i.write_text("[]"), "not the index of a checkpoint"),
        (lambda i: i.write_text("[" * 100_000), "nested too deep"),
        (lambda i: i.write_text("<html>"), "HTML page"),
        (
            lambda i: i.write_text(i.read_text().replace('"module.a"', '"module.c"')),
            r"names module\.c, which the shards do not hold",
        ),
    ],
)
def test_broken_index_is_one_line(tmp_path, spoil, message):
    index = write_shards(tmp_path)
    spoil(index)
    with pytest.raises(ValueError, match=message) as caught:
        read_checkpoint(str(index))
    assert "\n" not in str(caught.value)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 133466304\n"
IMPOSTORS = {
    "HTML page": b"\n<!DOCTYPE html><html><body>404</body></html>",
    "git-lfs pointer": LFS,
    "is empty": b"",
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin", ".pth.tar"])
@pytest.mark.parametrize("what", IMPOSTORS)
def test_impostor_is_called_what_it_is(tmp_path, what, suffix):
    if suffix != ".safetensors":
        pytest.importorskip("torch")
    path = tmp_path / f"a{suffix}"
    path.write_bytes(IMPOSTORS[what])
    with pytest.raises(ValueError, match=what) as caught:
        read_checkpoint(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [9, 40, -1])
def test_safetensors_that_end_early_are_called_cut_short(tmp_path, kept):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, WEIGHTS)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="cut short"):
        read_checkpoint(str(path))
