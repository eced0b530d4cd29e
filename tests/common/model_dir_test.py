"""The model directory: bitwise round trip, atomic replacement, one-line refusals."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dar_jax.common import model_dir

PARAMS = {
    "blocks": {"kernel": jnp.linspace(0, 1, 24).reshape(2, 3, 4).swapaxes(1, 2)},
    "scale": jnp.float32(0.1),
    "half": jnp.ones(3, jnp.bfloat16) / 3,
}


def _save(directory, params=PARAMS):
    model_dir.save_model(directory, "toy", {"width": 4}, params, {"class_names": ("a", "b")})


def test_round_trip_is_bitwise(tmp_path):
    _save(tmp_path / "model")
    config, params = model_dir.load_model(tmp_path / "model")
    assert config == {"kind": "toy", "model": {"width": 4}, "class_names": ["a", "b"]}
    assert params["blocks"].keys() == {"kernel"} and params.keys() == PARAMS.keys()
    for loaded, saved in (
        (params["blocks"]["kernel"], PARAMS["blocks"]["kernel"]),
        (params["scale"], PARAMS["scale"]),
        (params["half"], PARAMS["half"]),
    ):
        assert isinstance(loaded, np.ndarray) and loaded.dtype == saved.dtype
        assert loaded.shape == saved.shape and loaded.tobytes() == np.asarray(saved).tobytes()
    names = json.loads((tmp_path / "model" / "config.json").read_text()).keys()
    assert list(names) == ["kind", "model", "class_names"]
    modes = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert len(modes) == 1, "who can read one file can read both"


def test_failed_save_keeps_the_old_model_and_leaves_nothing(tmp_path, monkeypatch):
    _save(tmp_path / "model")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        _save(tmp_path / "model", {"other": jnp.zeros(1)})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert model_dir.load_model(tmp_path / "model")[1].keys() == PARAMS.keys()


def test_save_replaces_an_older_model(tmp_path):
    _save(tmp_path / "model")
    _save(tmp_path / "model", {"other": jnp.zeros(1)})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert model_dir.load_model(tmp_path / "model")[1].keys() == {"other"}


def test_companions_are_copied_in(tmp_path):
    _save(tmp_path / "tokenizer")
    model_dir.save_model(
        tmp_path / "prior",
        "prior",
        {},
        PARAMS,
        {},
        companions={"tokenizer": tmp_path / "tokenizer"},
    )
    assert model_dir.load_model(tmp_path / "prior")[0]["kind"] == "prior"
    assert model_dir.load_model(tmp_path / "prior" / "tokenizer")[0]["kind"] == "toy"


@pytest.mark.parametrize("damage", ["missing", "file", "no weights", "torn config", "torn weights"])
def test_unreadable_directory_is_one_line(tmp_path, damage):
    path = tmp_path / "model"
    if damage == "file":
        path.write_text("")
    elif damage != "missing":
        _save(path)
    if damage == "no weights":
        (path / "model.safetensors").unlink()
    elif damage == "torn config":
        (path / "config.json").write_text('{"kind": ')
    elif damage == "torn weights":
        (path / "model.safetensors").write_bytes(b"\0" * 5)
    with pytest.raises(ValueError, match="is not a readable model directory") as caught:
        model_dir.load_model(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_fingerprint_tells_models_apart(tmp_path):
    _save(tmp_path / "model")
    _save(tmp_path / "model" / "tokenizer")
    before = model_dir.fingerprint(tmp_path / "model")
    assert model_dir.fingerprint(tmp_path / "model") == before
    _save(tmp_path / "model" / "tokenizer", PARAMS | {"scale": jnp.float32(0.2)})
    assert model_dir.fingerprint(tmp_path / "model") != before
    with pytest.raises(ValueError, match="not a readable model directory"):
        model_dir.fingerprint(tmp_path / "none")
