"""`--mode=benchmark` on a tiny model, and what it says to bad input."""

import json
import math
import re

import jax
import jax.numpy as jnp
import pytest

from configs import imagenet_dar, imagenet_tokenizer, mnist
from dar_jax import benchmark, device_speed
from dar_jax.common.model_dir import save_model

SAMPLED = {"tokens", "end to end", "first preview", "streaming"}


@pytest.fixture(autouse=True)
def small_probes(monkeypatch):
    monkeypatch.setattr(device_speed, "PROBE_BYTES", 2**16)
    monkeypatch.setattr(device_speed, "MATMUL_SIZES", {"cpu": 64})
    monkeypatch.setattr(device_speed, "REPEATS", 2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A directory with the architecture of a tokenizer of two groups, without weights."""
    config = mnist.get_config("tokenizer").model
    config.update(num_tokens=4, num_groups=2, num_steps=2, codebook_size=32)
    config.decoder.update(depth=1)
    directory = tmp_path_factory.mktemp("tokenizer") / "model"
    save_model(directory, "dar_tokenizer", config.to_dict(), {}, {})
    return directory


@pytest.fixture(scope="module")
def config(tokenizer):
    config = mnist.get_config("dar")
    config.tokenizer = str(tokenizer)
    config.model.update(num_layers=1, num_tokens=4, vocab_size=32)
    config.benchmark.update(batch_sizes=(1, 2), guidance_scales=(2.0,), repeats=1)
    return config


@pytest.fixture(scope="module")
def drawn(config):
    """The tiny models; drawing them is most of the time."""
    return benchmark.load(benchmark.BenchmarkConfig(), config, benchmark.Compute())


@pytest.fixture
def without_drawing(drawn, monkeypatch):
    monkeypatch.setattr(benchmark, "load", lambda *arguments: drawn)


def changed(config, **settings):
    """A copy of the config with other benchmark settings."""
    copy = config.copy_and_resolve_references()
    copy.benchmark.update(settings)
    return copy


def read(directory):
    return [json.loads(line) for line in (directory / "benchmark.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("without_drawing")
def test_benchmark_writes_every_measurement_beside_its_bound(config, tmp_path, caplog):
    config = changed(config, batch_sizes=(2,), microbatch=1, guidance_scales=(2.0, 1.0))
    with caplog.at_level("INFO", logger="absl"):
        benchmark.benchmark(config, str(tmp_path / "new"))
    lines = read(tmp_path / "new")
    expected = {
        *((phase, 2, scale) for phase in SAMPLED for scale in (2.0, 1.0)),
        ("flow", 2, None),
    }
    found = [(line["phase"], line["batch_size"], line["guidance_scale"]) for line in lines]
    assert len(found) == len(expected)
    assert set(found) == expected
    for line in lines:
        numbers = [value for value in line.values() if isinstance(value, int | float)]
        assert all(map(math.isfinite, numbers))
        assert line["fraction_of_bound"] == line["bound_seconds"] / line["seconds"] > 0
        assert line["images_per_second"] == line["batch_size"] / line["seconds"]
        assert (line["weights"], line["dtype"]) == ("random", "float32")
        assert line["jax"] == jax.__version__
        if line["phase"] == "tokens":
            assert line["tokens_per_second"] == pytest.approx(4 * line["images_per_second"])
    assert "random weights" in caplog.text
    assert re.search(r"about \d+ s left", caplog.text)
    # The table ends the output: a title, the column names and a line per measurement.
    assert len(caplog.messages[-1].splitlines()) == 1 + 1 + 1 + len(expected)


@pytest.mark.usefixtures("without_drawing")
def test_batch_that_needs_more_memory_than_there_is_is_skipped(
    config, tmp_path, monkeypatch, caplog
):
    # Keys and values of 5 tokens of width 128 in float32, two rows, twice while they grow.
    monkeypatch.setattr(benchmark, "memory_bytes", lambda: 2 * 5 * 128 * 4 * 2 * 2)
    with caplog.at_level("INFO", logger="absl"):
        benchmark.benchmark(config, str(tmp_path))
    assert {line["batch_size"] for line in read(tmp_path)} == {1}
    assert "Batch size 2 skipped" in caplog.text


@pytest.mark.usefixtures("without_drawing")
def test_batch_that_exhausts_the_device_is_skipped(config, tmp_path, monkeypatch):
    def exhausted(self, scale):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(benchmark.Runs, "tokens", exhausted)
    with pytest.raises(ValueError, match=r"batch_sizes=\(1, 2\): none fits"):
        benchmark.benchmark(config, str(tmp_path))


@pytest.mark.usefixtures("without_drawing")
def test_other_failures_are_not_hidden(config, tmp_path, monkeypatch):
    def broken(self, scale):
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    monkeypatch.setattr(benchmark.Runs, "tokens", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
        benchmark.benchmark(config, str(tmp_path))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch_sizes", (1, 0), "batch_sizes=(1, 0) must be"),
        ("batch_sizes", (), "batch_sizes=() must be"),
        ("guidance_scales", (0.5,), "guidance_scales=(0.5,) must be"),
        ("microbatch", 3, "microbatch=3 must divide the batch of 4 images"),
        ("repeats", 0, "repeats=0 must be at least 1"),
        ("model", "nowhere", "nowhere is not a readable model directory"),
    ],
)
def test_bad_setting_is_refused(config, tmp_path, key, value, message):
    config = changed(config, **{"batch_sizes": (1, 4), key: value})
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        benchmark.benchmark(config, str(tmp_path / "none"))
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "none").exists()


def test_tokenizer_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match="config.task='dar_tokenizer' has no prior"):
        benchmark.benchmark(imagenet_tokenizer.get_config(), str(tmp_path))


def test_prior_of_another_tokenizer_is_refused(config, tmp_path):
    config = config.copy_and_resolve_references()
    config.tokenizer = str(tmp_path)
    with pytest.raises(ValueError, match=r"default architecture \(v1\).* has codebook_size=16384"):
        benchmark.benchmark(config, str(tmp_path))


def test_released_sizes_take_the_default_tokenizer(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        benchmark.FunctionalModel, "init", lambda model, rng: drawn.append(model) or {}
    )
    config = imagenet_dar.get_config("xl")
    config.tokenizer = str(tmp_path)
    settings = benchmark.BenchmarkConfig()
    benchmark.load(settings, config, benchmark.Compute(dtype="bfloat16"))
    assert [model.compute.dtype for model in drawn] == ["bfloat16"] * 2
    assert drawn[1].config == benchmark.TokenizerConfig()


def test_device_speed_is_positive_and_finite():
    speed = device_speed.measure(jnp.dtype("bfloat16"))
    assert 0 < speed.product_bandwidth <= speed.bandwidth < math.inf
    assert 0 < speed.flops < math.inf
