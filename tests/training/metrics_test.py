"""Averages, the metrics file, TensorBoard events, the progress line."""

import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dar_jax.config import build
from dar_jax.kinds.loading import build_task
from dar_jax.training import metrics
from tests.configs_test import CONFIGS
from tests.training.toy_task import ToyTask


def _update(loss):
    collection = metrics.collection(ToyTask())
    loss = jnp.asarray(loss)
    return collection.single_from_model_output(loss=loss, grad_norm=2 * loss, mse=3 * loss)


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["tokenizer", "kl_vae", "dar_reward"])
def test_runs_share_the_classes_of_their_metrics(name):
    """JAX keeps every class that it has seen, and what was compiled with it."""
    config = build(CONFIGS[f"mnist:{name}"]())
    first, second = (build_task(config, with_weights=False) for _ in range(2))
    assert metrics.collection(first) is metrics.collection(second)


def test_interval_averages_and_starts_anew(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    interval = metrics.Interval(16, flops_per_image=3e12, devices=jax.devices()[:4])
    for step, loss in ((1, 1.0), (2, 3.0), (3, 5.0)):
        interval.add(step, _update(loss))
        now[0] += 0.5
    values = interval.take(3)
    assert values == {
        "train/loss": 3.0,
        "train/grad_norm": 6.0,
        "train/mse": 9.0,
        "perf/seconds_per_step": pytest.approx(1.5 / 2),
        "perf/steps_per_second": pytest.approx(2 / 1.5),
        "perf/images_per_second": pytest.approx(16 * 2 / 1.5),
        "perf/tflops_per_device": pytest.approx(16 * 2 / 1.5 * 3 / 4),
    }
    interval.add(4, _update(7.0))
    interval.restart_clock(4)
    assert interval.take(4) == {"train/loss": 7.0, "train/grad_norm": 14.0, "train/mse": 21.0}


def test_mean_of_nothing_is_left_out():
    interval = metrics.Interval(16, flops_per_image=1.0, devices=jax.devices()[:1])
    measured = dict(loss=jnp.ones(()), grad_norm=jnp.ones(()), mse=jnp.nan * jnp.ones(()))
    interval.add(1, metrics.collection(ToyTask()).single_from_model_output(**measured))
    assert interval.take(1) == {"train/loss": 1.0, "train/grad_norm": 1.0}


def test_performance_of_a_known_chip_has_mfu():
    devices = [types.SimpleNamespace(device_kind="TPU v5 lite", core_on_chip=0)] * 2
    values = metrics.performance(0.5, 100, flops_per_image=1e12, devices=devices)
    assert values["perf/tflops_per_device"] == pytest.approx(100.0)
    assert values["perf/mfu"] == pytest.approx(100 / 197)


def test_performance_counts_cores_as_parts_of_a_chip():
    devices = [types.SimpleNamespace(device_kind="TPU v4", core_on_chip=i % 2) for i in range(4)]
    values = metrics.performance(1.0, 4, flops_per_image=55e12, devices=devices)
    assert values["perf/mfu"] == pytest.approx(55 / (275 / 2))


def test_writer_writes_lines_events_and_pictures(tmp_path):
    writer = metrics.Writer(tmp_path, first_step=0, num_steps=10)
    writer.scalars(1, {"train/loss": 0.5})
    writer.scalars(2, {"train/loss": 0.25, "train/mse": 4.0})
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    writer.pictures(2, {"samples": pixels})
    writer.close()
    assert _lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "train/loss": 0.5},
        {"step": 2, "train/loss": 0.25, "train/mse": 4.0},
    ]
    np.testing.assert_array_equal(Image.open(tmp_path / "images/samples_0000002.png"), pixels)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.5), (2, 0.25)]
    (picture,) = events.Images("samples")
    assert (picture.step, picture.height, picture.width) == (2, 4, 6)


def test_resumed_writer_leaves_no_doubles(tmp_path):
    writer = metrics.Writer(tmp_path, first_step=0, num_steps=10)
    for step in range(1, 6):
        writer.scalars(step, {"train/loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')
    writer = metrics.Writer(tmp_path, first_step=3, num_steps=10)
    writer.scalars(4, {"train/loss": 40.0})
    writer.close()
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert [(v["step"], v["train/loss"]) for v in _lines(tmp_path / "metrics.jsonl")] == expected
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == expected


def test_time_left_may_be_days():
    values = {"perf/steps_per_second": 0.1, "perf/seconds_per_step": 10.0}
    values |= {"perf/images_per_second": 1.0, "perf/tflops_per_device": 1.0}
    values["perf/data_wait_share"] = 0.314
    assert "| waiting for data 31% |" in metrics._progress(0, 20_000, values)
    assert metrics._progress(0, 20_000, values).endswith("2 days, 7:33:20 left")


def test_progress_names_speed_and_time_left(tmp_path, caplog):
    logging.get_absl_logger().propagate = True
    with caplog.at_level("INFO", logger="absl"):
        writer = metrics.Writer(tmp_path, first_step=0, num_steps=100)
        writer.scalars(
            40,
            {
                "train/loss": math.pi,
                "perf/seconds_per_step": 2.0,
                "perf/steps_per_second": 0.5,
                "perf/images_per_second": 8.0,
                "perf/tflops_per_device": 12.0,
                "perf/mfu": 0.456,
            },
        )
        writer.close()
    expected = (
        "step 40/100 | loss 3.142 | 2 s/step | 8 images/s | 12 TFLOP/s per device | MFU 45.6% | "
        "0:02:00 left"
    )
    assert expected in caplog.messages


def test_lines_that_are_no_figures_are_set_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    bad = [b"\xff\x00\n", b"[1]\n", b'{"loss": 1}\n', b'{"step": "2"}\n', b"[" * 100_000 + b"\n"]
    good = [b'{"step": 1}\n', b'{"step": 2, "loss": 3}\n']
    path.write_bytes(b"".join([good[0], *bad, good[1], b'{"step": 3}\n', b'{"st']))
    metrics.cut_lines(path, 2)
    assert path.read_bytes() == b"".join(good)
    assert (tmp_path / "metrics.jsonl.bad").read_bytes() == b"".join(bad)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("change", "is_said"),
    [
        (lambda lines: lines, False),
        (lambda lines: [*lines, lines[-1], b'{"step": 3}\n'], False),  # after the checkpoint
        (lambda lines: [*lines[:-1], lines[-1].removesuffix(b"\n")], False),  # all of it but that
        (lambda lines: [*lines[:-1], lines[-1][:-2]], True),
        (lambda lines: lines[1:], True),
        (lambda lines: lines[:-1], True),
        (lambda lines: [lines[0].replace(b"0.5", b"0.7"), *lines[1:]], True),
        (lambda lines: [], True),
    ],
)
def test_lines_that_a_checkpoint_knew_are_missed(tmp_path, caplog, change, is_said):
    writer = metrics.Writer(tmp_path, first_step=0, num_steps=10)
    for step in (1, 2):
        writer.scalars(step, {"train/loss": 0.5})
    written = writer.written()
    writer.close()
    path = tmp_path / metrics.FILE_NAME
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    caplog.clear()
    writer = metrics.Writer(tmp_path, first_step=2, num_steps=10, written=written)
    said = "is not as it was at step 2" in caplog.text
    assert said == is_said
    # What is left is what counts from here on.
    again = metrics.Writer(tmp_path, first_step=2, num_steps=10, written=writer.written())
    assert caplog.text.count("is not as it was") == is_said
    again.close()
    writer.close()
