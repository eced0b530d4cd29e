"""What a user reads while images are made."""

import jax
import jax.numpy as jnp
import pytest
from absl import logging

from dar_jax.common import progress


def test_first_line_tells_how_long_compilation_took(caplog, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    logging.get_absl_logger().propagate = True
    with caplog.at_level("INFO", logger="absl"):
        lines = progress.Progress(3)
        for event in progress.COMPILATION_EVENTS:
            jax.monitoring.record_event_duration_secs(event, 3.0)
        now[0] += 7.0
        lines.add(1)
        now[0] += 4.0
        lines.add(2)
    assert caplog.messages == [
        "0 of 3 images: compiling what is new, which can take minutes",
        "1 of 3 images in 7.0 s, 6.0 s of it compilation",
        "3 of 3 images, 0.5 per second, 0:00:00 left",
    ]


def test_what_others_told_is_counted_without_a_line(caplog, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    logging.get_absl_logger().propagate = True
    with caplog.at_level("INFO", logger="absl"):
        lines = progress.Progress(100, "steps", every=30.0)
        for seconds, told in (
            (7.0, True),
            (20.0, False),
            (20.0, True),
            (20.0, False),
            (20.0, False),
        ):
            now[0] += seconds
            lines.add(1, told=told)
        lines.add(95, told=True)
    assert caplog.messages == [
        "0 of 100 steps: compiling what is new, which can take minutes",
        "1 of 100 steps in 7.0 s, 0.0 s of it compilation",
        "5 of 100 steps, 0.05 per second, 0:31:40 left",
    ]


def test_jax_reports_compilation_under_these_names():
    seen = set()

    def listen(event, seconds, **_):
        seen.add(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.jit(lambda x: jnp.sort(jnp.tanh(x)))(jnp.ones(17))
    jax.monitoring.unregister_event_duration_listener(listen)
    assert seen >= set(progress.COMPILATION_EVENTS)


def test_waiting_for_others_ends_and_names_what_is_waited_for(monkeypatch):
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(progress, "MAX_WAIT_SECONDS", 0.05)
    progress.wait_for(lambda: True, "nothing")
    with pytest.raises(ValueError, match="gave up waiting for the merged file; run the same"):
        progress.wait_for(lambda: False, "the merged file")
