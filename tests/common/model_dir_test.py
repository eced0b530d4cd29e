"""The model directory: bitwise round trip, atomic replacement, one-line refusals."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dar_jax.common import model_dir
from tests.damage import DAMAGES, damage, outcome, warnings

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


def test_weights_that_are_not_finite_are_named(tmp_path):
    _save(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    arrays = safetensors.numpy.load_file(path)
    arrays["blocks/kernel"] = arrays["blocks/kernel"].copy()
    arrays["blocks/kernel"][1, 2, 0] = np.nan
    message = r"model: parameter blocks/kernel: 1 of 24 .* the first is nan at \(1, 2, 0\)"
    with pytest.raises(ValueError, match=message):
        _save(tmp_path / "other_model", {"blocks": {"kernel": arrays["blocks/kernel"]}})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    safetensors.numpy.save_file(arrays, path)
    (path.parent / "digests.json").unlink()
    with pytest.raises(ValueError, match=message):
        model_dir.load_model(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        model_dir.load_params(tmp_path / "model", PARAMS)


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
    nested = model_dir.companion(tmp_path / "prior", "tokenizer")
    assert model_dir.load_model(nested)[0]["kind"] == "toy"
    _save(nested, PARAMS | {"scale": jnp.float32(0.2)})
    with pytest.raises(ValueError, match="prior holds another tokenizer than it was made with"):
        model_dir.companion(tmp_path / "prior", "tokenizer")


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


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "digests.json"])
def test_damaged_model_is_one_line_or_a_warning_or_the_same(tmp_path, caplog, name, how):
    _save(tmp_path / "model")
    expected = model_dir.load_model(tmp_path / "model")
    assert damage(tmp_path / "model" / name, how)
    with warnings(caplog) as told:
        found, refusal = outcome(lambda: model_dir.load_model(tmp_path / "model"))
    if refusal:
        assert str(tmp_path / "model") in refusal
        return
    config, params = found
    assert name != "model.safetensors"
    assert config == expected[0] or any("has changed" in text for text in told)
    np.testing.assert_array_equal(params["scale"], expected[1]["scale"])


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_what_is_no_path_is_one_line(path):
    with pytest.raises(ValueError, match=r"is no path of a model directory; pass WORKDIR/model"):
        model_dir.locate(path)


def test_config_that_was_edited_is_read_with_a_warning(tmp_path, caplog):
    _save(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(path.read_text().replace('"a"', '"z"'))
    with warnings(caplog) as told:
        assert model_dir.load_config(tmp_path / "model")["class_names"] == ["z", "b"]
    assert len(told) == 1 and "config.json has changed" in told[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deep"),
        ("<html>not found</html>", "HTML page"),
        ("version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        ('{"kind": ["toy"], "model": {}}', "has no kind and model"),
    ],
)
def test_config_that_is_something_else_is_called_so(tmp_path, text, message):
    _save(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        model_dir.load_config(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_weights_of_8_bit_floats_are_read(tmp_path):
    _save(tmp_path / "model", {"a": jnp.ones((2, 3)), "b": jnp.zeros(2)})
    values = np.float32([[1.5, -2, 3], [4, 0.5, 6]])
    header = {
        "a": {"dtype": "F8_E4M3", "shape": [2, 3], "data_offsets": [0, 6]},
        "b": {"dtype": "F8_E5M2", "shape": [2], "data_offsets": [6, 8]},
    }
    text = json.dumps(header).encode()
    data = values.astype(jnp.float8_e4m3fn).tobytes() + bytes(2)
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    (tmp_path / "model" / "digests.json").unlink()
    params = model_dir.load_params(tmp_path / "model", {"a": jnp.ones((2, 3)), "b": jnp.ones(2)})
    np.testing.assert_array_equal(params["a"], values)
    assert params["a"].dtype == np.float32
    np.testing.assert_array_equal(model_dir.load_model(tmp_path / "model")[1]["b"], [0, 0])
