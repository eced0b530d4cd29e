"""A new kind of model is one file and one line: it trains, samples, converts and is timed."""

import json

import numpy as np
import pytest

from configs import common, mnist
from dar_jax.common import model_dir
from dar_jax.config import block
from dar_jax.config import build as read_config
from dar_jax.kinds import KINDS
from dar_jax.kinds.loading import from_pretrained
from dar_jax.modes import benchmark, convert, evaluate, sample, train
from dar_jax.performance import device_speed
from tests.kinds.bigram import BigramConfig, BigramKind, BigramPipeline

STEPS = 30


@pytest.fixture(autouse=True, scope="module")
def registered():
    KINDS[BigramKind.name] = BigramKind()
    yield
    del KINDS[BigramKind.name]


@pytest.fixture(scope="module")
def config():
    config = common.base()
    config.task = "bigram"
    config.model = block(BigramConfig())
    config.tokenizer = "package://mnist/tokenizer"
    config.data.batch_size = 16
    config.optimizer.update(learning_rate=0.03, warmup_steps=0, ema_decay=0.0)
    config.train.update(steps=STEPS, log_every=1, checkpoint_every=STEPS, image_every=0)
    config.sample.update(labels=(3, 1), images_per_class=2, temperature=0.5)
    mnist.quick_evaluation(config)
    return config


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("bigram")
    train.train_and_evaluate(read_config(config), str(workdir))
    return workdir


def test_it_trains_and_exports(trained):
    curve = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert curve[-1]["train/loss"] < curve[0]["train/loss"] - 0.1
    assert curve[-1]["perf/images_per_second"] > 0
    pipeline = from_pretrained(trained)
    assert isinstance(pipeline, BigramPipeline)
    assert pipeline.class_names == tuple("0123456789")


def test_it_samples(config, trained):
    sample.sample(read_config(config), str(trained))
    arrays = np.load(trained / "samples/samples.npz")
    assert arrays["labels"].tolist() == [3, 3, 1, 1]
    assert arrays["indices"].shape == (4, 32) and arrays["images"].std() > 0


def test_option_of_another_kind_is_refused(config, trained):
    config = config.copy_and_resolve_references()
    config.sample.top_k = 3
    with pytest.raises(ValueError, match=r"top_k=3 is not an option .* temperature"):
        sample.sample(read_config(config), str(trained))


@pytest.mark.slow
def test_it_is_evaluated(config, trained):
    config = config.copy_and_resolve_references()
    config.evaluate.update(evaluators="generation,reconstruction", num_images=20)
    evaluate.evaluate(read_config(config), str(trained))
    results = json.loads((trained / "evaluation.json").read_text())
    assert 0 <= results["generation/accuracy"] <= 1 and results["reconstruction/psnr_db"] > 10
    assert results["temperature"] == 0.5


def test_it_converts_both_ways(config, trained, tmp_path):
    config = config.copy_and_resolve_references()
    config.convert.update(source=str(trained), to="torch")
    convert.convert(read_config(config), str(tmp_path))
    config.convert.update(source=str(tmp_path / "bigram.safetensors"), to="jax")
    convert.convert(read_config(config), str(tmp_path))
    first, second = (model_dir.load_model(path / "model")[1] for path in (trained, tmp_path))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert (tmp_path / "model/tokenizer/config.json").exists()


def test_it_is_timed_beside_its_bound(config, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(device_speed, "PROBE_BYTES", 2**16)
    monkeypatch.setattr(device_speed, "MATMUL_SIZES", {"cpu": 64})
    config = config.copy_and_resolve_references()
    config.benchmark.update(batch_sizes=(2,), guidance_scales=(2.0,), repeats=1)
    config.benchmark.model = str(trained)
    benchmark.benchmark(read_config(config), str(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "benchmark.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in rows] == ["tokens", "end to end", "first preview", "streaming"]
    assert all(row["seconds"] > 0 and row["bound_seconds"] > 0 for row in rows)
