"""What a report says of waiting for data."""

import types

from absl import logging

from dar_jax.training.report import Report


def test_long_waiting_is_said_once_with_the_key_that_helps(caplog):
    waits = iter([(0.1, 0.19), (0.2, 0.41), (0.3, 0.5)])
    iterator = types.SimpleNamespace(
        take_wait=lambda: next(waits), advice=lambda cores: "raise config.data.num_workers=0"
    )
    report = object.__new__(Report)  # whose other parts have no share in it
    report._iterator, report._advised = iterator, False
    logging.get_absl_logger().propagate = True
    with caplog.at_level("INFO", logger="absl"):
        shares = [report._wait()["perf/data_wait_share"] for _ in range(3)]
    assert shares == [0.19, 0.41, 0.5]
    assert caplog.messages == [
        "41 % of a step is waiting for data: raise config.data.num_workers=0"
    ]
