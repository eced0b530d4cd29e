"""`--mode=convert` in both directions, from tiny models of the golden folders."""

import dataclasses
import logging
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from configs import common, imagenet_dar, imagenet_tokenizer, mnist
from dar_jax.common import model_dir, tree
from dar_jax.common.config_build import build
from dar_jax.common.files import write_safetensors
from dar_jax.config import build as read_config
from dar_jax.convert import dar
from dar_jax.kinds.loading import from_pretrained
from dar_jax.models.dar.tokenizer import Tokenizer, TokenizerConfig
from dar_jax.modes import convert as mode
from dar_jax.nn.functional_model import FunctionalModel
from tests.golden import fixtures, models

TOKENIZER, PRIOR = "dar/tokenizer_tiny", "dar/gpt_tiny"
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def log(caplog):
    """Messages logged so far."""
    logger = logging.getLogger("absl")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger="absl")
    yield caplog
    logger.removeHandler(caplog.handler)


def config_of(folder, **convert):
    """The released config with the architecture of a golden folder."""
    reference = fixtures.load_json(folder, "config")
    if folder == TOKENIZER:
        config = imagenet_tokenizer.get_config()
        config.model = common.block(dar.tokenizer_config(reference))
    else:
        config = imagenet_dar.get_config("b")
        config.model = common.block(dar.prior_config(reference))
        config.tokenizer = "none"
    config.convert.update(convert)
    return config


def convert(folder, workdir, source, **convert_block):
    mode.convert(read_config(config_of(folder, source=str(source), **convert_block)), str(workdir))
    return workdir


def write_source(path, folder, **changes):
    """The weights of a golden folder as `.safetensors`; None removes a tensor."""
    state_dict = fixtures.load_state_dict(folder) | changes
    write_safetensors(path, {name: a for name, a in state_dict.items() if a is not None})
    return path


def assert_same_params(loaded, expected):
    loaded, expected = tree.flatten(loaded), tree.flatten(expected)
    assert loaded.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(loaded[name], array, err_msg=name)


@pytest.mark.parametrize("folder", [TOKENIZER, PRIOR])
def test_safetensors_become_a_model_directory(tmp_path, log, folder):
    source = write_source(tmp_path / "a.safetensors", folder)
    convert(folder, tmp_path / "out" / "deep", source)
    config, params = model_dir.load_model(tmp_path / "out" / "deep" / "model")
    model, expected = models.tokenizer(folder) if folder == TOKENIZER else models.prior(folder)
    assert config["kind"] == ("dar_tokenizer" if folder == TOKENIZER else "dar_prior")
    assert config["model"] == dataclasses.asdict(model.config)
    assert_same_params(params, expected)
    assert "Wrote" in log.text


def test_buffers_are_left_out_and_reported(tmp_path, log):
    cache = np.zeros((1, 2), np.float32)
    buffers = {"freqs_cis": cache, "layers.1.attention.kv_cache.k_cache": cache}
    convert(PRIOR, tmp_path, write_source(tmp_path / "a.safetensors", PRIOR, **buffers))
    assert "Left out 2 tensors that are no parameters: freqs_cis, layers.1.attention" in log.text
    convert(TOKENIZER, tmp_path, write_source(tmp_path / "b.safetensors", TOKENIZER))
    assert "Left out 1 tensors that are no parameters: quantize.codebook_used" in log.text


def test_config_in_the_file_counts(tmp_path, log):
    torch = pytest.importorskip("torch")
    state_dict = {n: torch.tensor(a) for n, a in fixtures.load_state_dict(TOKENIZER).items()}
    reference = fixtures.load_json(TOKENIZER, "config")
    torch.save({"ema": state_dict, "config": reference}, tmp_path / "a.pt")
    released = imagenet_tokenizer.get_config()
    released.convert.source = str(tmp_path / "a.pt")
    mode.convert(read_config(released), str(tmp_path / "out"))
    tokenizer = from_pretrained(tmp_path / "out")
    assert tokenizer.config == dar.tokenizer_config(reference)
    io, _ = fixtures.load_io(TOKENIZER, "io_encode")
    np.testing.assert_array_equal(tokenizer.encode(io["image_nhwc"]), io["codes"])
    assert "186 tensors from ema" in log.text and "config from the checkpoint" in log.text


@pytest.mark.parametrize("folder", [TOKENIZER, PRIOR])
def test_round_trip_is_bitwise(tmp_path, folder):
    original = fixtures.load_state_dict(folder)
    first = convert(folder, tmp_path / "a", write_source(tmp_path / "a.safetensors", folder))
    convert(folder, first, "", to="torch")
    exported = first / f"dar_{'tokenizer' if folder == TOKENIZER else 'prior'}.safetensors"
    written = safetensors.numpy.load_file(exported)
    assert {n: a.shape for n, a in written.items()} == {n: a.shape for n, a in original.items()}
    for name, array in written.items():
        assert array.dtype == np.float32
        expected = np.zeros_like(array) if name == dar.CODEBOOK_QUEUE else original[name]
        np.testing.assert_array_equal(array, expected)
    second = convert(folder, tmp_path / "b", exported)
    weights = [path / "model" / model_dir.WEIGHTS_NAME for path in (first, second)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_to_torch_refuses_what_the_reference_cannot_hold(tmp_path):
    config = build(TokenizerConfig, mnist.get_config("tokenizer").model.to_dict(), "model")
    shapes = FunctionalModel(Tokenizer, config).abstract_params()
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    model_dir.save_model(tmp_path / "m", "dar_tokenizer", dataclasses.asdict(config), params, {})
    with pytest.raises(ValueError, match="cannot hold max_tokens=32, only 1024"):
        convert(TOKENIZER, tmp_path / "out", tmp_path / "m", to="torch")
    assert not (tmp_path / "out").exists()


def test_prior_takes_its_tokenizer_along(tmp_path, log):
    prior = write_source(tmp_path / "prior.safetensors", PRIOR)
    tokenizer = write_source(tmp_path / "tokenizer.safetensors", TOKENIZER)
    convert(TOKENIZER, tmp_path / "tokenizer", tokenizer)
    config = config_of(PRIOR, source=str(prior))
    config.tokenizer = str(tmp_path / "tokenizer")
    mode.convert(read_config(config), str(tmp_path / "dar"))
    pipeline = from_pretrained(tmp_path / "dar" / "model")
    assert_same_params(pipeline.prior.params, models.prior(PRIOR)[1])
    assert_same_params(pipeline.tokenizer.params, models.tokenizer(TOKENIZER)[1])

    config.model.num_tokens = 32
    with pytest.raises(ValueError, match="num_tokens=32, but the tokenizer in .* num_tokens=16"):
        mode.convert(read_config(config), str(tmp_path / "other"))
    config.tokenizer = str(tmp_path / "dar")
    with pytest.raises(ValueError, match="holds a dar_prior, expected a dar_tokenizer"):
        mode.convert(read_config(config), str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_prior_without_a_tokenizer_says_what_to_do(tmp_path, log):
    convert(PRIOR, tmp_path, write_source(tmp_path / "a.safetensors", PRIOR))
    assert "no tokenizer in none" in log.text
    with pytest.raises(ValueError, match="without its tokenizer: put the tokenizer's") as caught:
        from_pretrained(tmp_path)
    assert "--config.tokenizer=DIR" in str(caught.value) and "\n" not in str(caught.value)


BAD_WEIGHTS = {
    "missing": (PRIOR, {"norm.weight": None}, "missing norm.weight$"),
    "surplus": (PRIOR, {"norm.bias": np.zeros(3)}, "surplus norm.bias$"),
    "misshapen": (
        PRIOR,
        {"norm.weight": np.zeros(3, np.float32)},
        r"misshapen norm\.weight has \(3,\), expected \(64,\)$",
    ),
    "too many layers": (
        TOKENIZER,
        {f"encoder_layers.{i}.gate1": np.zeros(64, np.float32) for i in range(2, 12)},
        r"surplus encoder_layers\.10\.gate1, .* and 5 more$",
    ),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_weights_that_do_not_fit_are_listed(tmp_path, name):
    folder, changes, message = BAD_WEIGHTS[name]
    source = write_source(tmp_path / "a.safetensors", folder, **changes)
    with pytest.raises(ValueError, match=f"a.safetensors: .*{message}") as caught:
        convert(folder, tmp_path / "out", source)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_weights_of_another_architecture_are_listed(tmp_path):
    source = write_source(tmp_path / "a.safetensors", PRIOR)
    with pytest.raises(ValueError, match="missing .* and .* more; surplus .* and .* more"):
        convert(TOKENIZER, tmp_path / "out", source)
    assert not (tmp_path / "out").exists()


def test_mistakes_are_named(tmp_path):
    source = write_source(tmp_path / "a.safetensors", PRIOR)
    with pytest.raises(ValueError, match=r"config\.convert\.source is empty"):
        convert(PRIOR, tmp_path / "out", "")
    with pytest.raises(ValueError, match="to='onnx' must be one of jax, torch"):
        convert(PRIOR, tmp_path / "out", source, to="onnx")
    with pytest.raises(ValueError, match="is not a readable model directory"):
        convert(PRIOR, tmp_path / "out", tmp_path / "none", to="torch")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write .*choose another workdir"):
        convert(PRIOR, tmp_path / "file", source)
    assert not (tmp_path / "out").exists()


def test_command_line_refuses_with_one_line(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    arguments = [
        "--mode=convert",
        "--config=configs/imagenet_dar.py:l",
        f"--config.convert.source={tmp_path}/cut.safetensors",
        f"--workdir={tmp_path}/out",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "dar_jax.main", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("dar_jax: error: ") and "cut.safetensors" in lines[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
