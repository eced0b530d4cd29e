"""`--mode=benchmark` on tiny models of both families, and what it says to bad input."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import imagenet_dar, imagenet_tokenizer, mnist
from dar_jax.common.model_dir import save_model
from dar_jax.config import build as read_config
from dar_jax.kinds.dar_tokenizer import DarTokenizer
from dar_jax.kinds.transdiff_runs import TransDiffRuns
from dar_jax.models.transdiff.options import TransDiffSampling
from dar_jax.modes import benchmark
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.performance import device_speed
from dar_jax.performance.config import BenchmarkConfig
from dar_jax.performance.runs import SEED
from dar_jax.pipelines.dar import PriorPipeline
from tests import tiny_transdiff

IMAGES = {"end to end", "first preview", "streaming"}
FIELDS = {
    *("phase", "batch_size", "guidance_scale", "seconds", "bound_seconds", "images_per_second"),
    *("bound_images_per_second", "fraction_of_bound", "device", "platform", "cpu_count", "jax"),
    *("dtype", "weights", "repeats", "bandwidth", "product_bandwidth", "matmul_flops", "solver"),
    *("decode_dtype", "decode_matmul_flops", "num_steps", "dim", "bandwidth_warning", "search"),
}
"""Names in every line, whatever is timed."""
DAR_FIELDS = {
    *("guidance_schedule", "guidance_interval", "temperature", "top_k", "top_p", "num_layers"),
    *("lookahead", "draft"),
}
TRANSDIFF_FIELDS = {
    *("guidance_times", "drift_scale", "noise_scale", "encoder_depth", "decoder_depth"),
    *("latent_size", "num_references"),
}
DETAILS = {
    "tokens": {"ms_per_token", "tokens_per_second"},
    "flow": {"seconds_per_step"},
    "encoder": {"ms_per_pass"},
    "denoising": {"ms_per_step"},
    "decode": set(),
    "end to end": set(),
    "first preview": {"ms"},
    "streaming": {"without_previews", "overhead"},
}


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
def mrar_config(tmp_path_factory):
    config = mnist.get_config("transdiff_mrar")
    config.vae = str(tiny_transdiff.save_vae(tmp_path_factory.mktemp("vae")))
    config.model.update(dataclasses.asdict(tiny_transdiff.MRAR))
    config.sample.num_steps = 3
    config.benchmark.update(batch_sizes=(2,), microbatch=1, guidance_scales=(2.0,), repeats=1)
    return config


def draw(config):
    return benchmark.load(read_config(config))


@pytest.fixture(scope="module")
def drawn(config, mrar_config):
    """The tiny models by task; drawing them is most of the time."""
    return {each.task: draw(each) for each in (config, mrar_config)}


@pytest.fixture
def without_drawing(drawn, monkeypatch):
    monkeypatch.setattr(benchmark, "load", lambda config: drawn[config.task])


def changed(config, **settings):
    """A copy of the config with other benchmark settings."""
    copy = config.copy_and_resolve_references()
    copy.benchmark.update(settings)
    return copy


def read(directory):
    return [json.loads(line) for line in (directory / "benchmark.jsonl").read_text().splitlines()]


def check_lines(lines, scales, guided, unguided, fields):
    """Every phase at all scales, and one that has none; every figure beside its bound."""
    expected = {
        *((phase, 2, scale) for phase in guided | IMAGES for scale in scales),
        (unguided, 2, None),
    }
    found = [(line["phase"], line["batch_size"], line["guidance_scale"]) for line in lines]
    assert len(found) == len(expected)
    assert set(found) == expected
    for line in lines:
        assert set(line) == FIELDS | fields | DETAILS[line["phase"]]
        numbers = [value for value in line.values() if isinstance(value, int | float)]
        assert all(map(math.isfinite, numbers))
        assert line["fraction_of_bound"] == line["bound_seconds"] / line["seconds"] > 0
        assert line["images_per_second"] == line["batch_size"] / line["seconds"]
        assert (line["weights"], line["dtype"]) == ("random", "float32")
        assert line["jax"] == jax.__version__


@pytest.mark.usefixtures("without_drawing")
def test_benchmark_writes_every_measurement_beside_its_bound(config, tmp_path, caplog):
    config = changed(config, batch_sizes=(2,), microbatch=1, guidance_scales=(2.0, 1.0))
    with caplog.at_level("INFO", logger="absl"):
        benchmark.benchmark(read_config(config), str(tmp_path / "new"))
    lines = read(tmp_path / "new")
    check_lines(lines, (2.0, 1.0), {"tokens"}, "flow", DAR_FIELDS)
    for line in lines:
        assert (line["num_layers"], line["solver"]) == (1, "euler")
        if line["phase"] == "tokens":
            assert line["tokens_per_second"] == pytest.approx(4 * line["images_per_second"])
    assert "random weights" in caplog.text
    assert re.search(r"about \d+ s left", caplog.text)
    # The table ends the output: a title, the column names and a line per measurement.
    assert len(caplog.messages[-1].splitlines()) == 1 + 1 + 1 + len(lines)


@pytest.mark.slow
@pytest.mark.usefixtures("without_drawing")
def test_benchmark_of_transdiff_has_its_own_phases(mrar_config, tmp_path, caplog):
    with caplog.at_level("INFO", logger="absl"):
        benchmark.benchmark(read_config(mrar_config), str(tmp_path))
    lines = read(tmp_path)
    check_lines(lines, (2.0,), {"encoder", "denoising"}, "decode", TRANSDIFF_FIELDS)
    bounds = {line["phase"]: line["bound_seconds"] for line in lines}
    for line in lines:
        assert (line["num_steps"], line["num_references"]) == (3, 4)
        if line["phase"] == "denoising":
            assert line["ms_per_step"] == pytest.approx(1e3 * line["seconds"] / (3 * 4))
    parts = bounds["encoder"] + bounds["denoising"] + bounds["decode"]
    assert bounds["end to end"] == pytest.approx(parts)
    assert "num_references 4, num_steps 3" in caplog.text


@pytest.mark.slow
def test_parts_of_transdiff_are_what_sampling_runs(drawn):
    """The first pass that is timed ends with the latents of the first preview."""
    pipeline, _ = drawn["transdiff"]
    sampling = TransDiffSampling(num_steps=3, drift_scale=0.9)
    speed = device_speed.DeviceSpeed(1.0, 1.0, 1.0)
    timed = TransDiffRuns(pipeline, sampling, speed, speed, 2, None, 1)
    encoder, denoising = timed.parts(2.0)
    assert [cache.keys.shape[-2] for cache in encoder.run()] == [4, 8, 12, 16]
    first = denoising.run()[0]
    rng = jax.random.key(SEED)
    expected = pipeline.stream([0, 1], rng=rng, sampling=sampling, guidance_scale=2.0)
    np.testing.assert_allclose(first, next(expected).latents, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("without_drawing")
def test_batch_that_needs_more_memory_than_there_is_is_skipped(
    config, tmp_path, monkeypatch, caplog
):
    # Keys and values of 5 tokens of width 128 in float32, two rows, twice while they grow.
    monkeypatch.setattr(benchmark, "memory_bytes", lambda: 2 * 5 * 128 * 4 * 2 * 2)
    with caplog.at_level("INFO", logger="absl"):
        benchmark.benchmark(read_config(config), str(tmp_path))
    assert {line["batch_size"] for line in read(tmp_path)} == {1}
    assert "Batch size 2 skipped" in caplog.text


@pytest.mark.usefixtures("without_drawing")
def test_batch_that_exhausts_the_device_is_skipped(config, tmp_path, monkeypatch):
    def exhausted(*_, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(PriorPipeline, "generate_indices", exhausted)
    with pytest.raises(ValueError, match=r"batch_sizes=\(1, 2\): none fits"):
        benchmark.benchmark(read_config(config), str(tmp_path))


@pytest.mark.usefixtures("without_drawing")
def test_other_failures_are_not_hidden(config, tmp_path, monkeypatch):
    def broken(*_, **options):
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    monkeypatch.setattr(PriorPipeline, "generate_indices", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
        benchmark.benchmark(read_config(config), str(tmp_path))


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
        benchmark.benchmark(read_config(config), str(tmp_path / "none"))
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "none").exists()


def test_models_that_draw_no_images_are_refused(config, mrar_config, tmp_path):
    with pytest.raises(ValueError, match="config.task='dar_tokenizer' draws no images"):
        benchmark.benchmark(read_config(imagenet_tokenizer.get_config()), str(tmp_path))
    config = changed(config, model=mrar_config.vae)
    with pytest.raises(ValueError, match="vae holds a KL autoencoder, which draws no images"):
        benchmark.benchmark(read_config(config), str(tmp_path))


@pytest.mark.usefixtures("without_drawing")
def test_option_of_the_other_family_is_refused(mrar_config, tmp_path):
    mrar_config = mrar_config.copy_and_resolve_references()
    mrar_config.sample.top_k = 5
    with pytest.raises(ValueError, match="config.sample.top_k=5 is not an option"):
        benchmark.benchmark(read_config(mrar_config), str(tmp_path))


def test_model_of_another_companion_is_refused(config, mrar_config, tmp_path):
    config = config.copy_and_resolve_references()
    config.tokenizer = str(tmp_path / "none")
    with pytest.raises(ValueError, match=r"tokenizer in .*none has codebook_size=16384"):
        benchmark.benchmark(read_config(config), str(tmp_path))
    mrar_config = mrar_config.copy_and_resolve_references()
    mrar_config.vae = str(tmp_path / "none")
    with pytest.raises(ValueError, match=r"autoencoder in .*none has latent_channels=16"):
        benchmark.benchmark(read_config(mrar_config), str(tmp_path))


def test_released_sizes_take_the_released_tokenizer(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(FunctionalModel, "init", lambda model, rng: drawn.append(model) or {})
    config = imagenet_dar.get_config("xl")
    config.tokenizer = str(tmp_path / "none")
    benchmark.load(read_config(config))
    assert [model.compute.dtype for model in drawn] == ["float32", "bfloat16"]
    assert drawn[0].config == DarTokenizer.released


def test_device_speed_is_positive_and_finite():
    speed = device_speed.measure(jnp.dtype("bfloat16"))
    assert 0 < speed.product_bandwidth <= speed.bandwidth < math.inf
    assert 0 < speed.flops < math.inf


@pytest.mark.parametrize(
    "what",
    ["train", "data", *(pytest.param(w, marks=pytest.mark.slow) for w in ("encode", "evaluate"))],
)
def test_programs_and_reading_are_timed(config, tmp_path, what):
    settings = changed(config, what=what)
    settings.data.update(source="synthetic", image_size=32, batch_size=8)
    settings.evaluate.update(features="vgg16", batch_size=8)
    benchmark.benchmark(read_config(settings), str(tmp_path))
    (line,) = (tmp_path / "benchmark.jsonl").read_text().splitlines()
    line = json.loads(line)
    assert (line["what"], line["batch_size"]) == (what, 8)
    if what == "data":
        assert line["images_per_second"] > 0
    else:
        assert line["perf/images_per_second"] > 0
        assert line["compile_seconds"] > 0
        assert line["memory"] > 0


def test_unknown_benchmark_is_refused():
    with pytest.raises(
        ValueError, match="what='speed' must be one of sample, train, encode, data, evaluate"
    ):
        BenchmarkConfig(what="speed")
