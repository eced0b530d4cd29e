"""Probes of the bandwidth: how much they read, what is under way, and what they say of it."""

import jax.numpy as jnp
import pytest

from dar_jax.parallel.chips import CHIPS
from dar_jax.performance import device_speed
from dar_jax.performance.device_speed import probe_bytes, shortfall

START = 60e-6
"""Seconds that it takes to start a call on a GPU."""
H200 = CHIPS["NVIDIA H200"]


@pytest.mark.parametrize("name", CHIPS)
def test_probe_reads_far_longer_than_a_call_takes_to_start(name):
    chip = CHIPS[name]
    num_bytes = probe_bytes("gpu", int(chip.hbm_bytes))
    assert num_bytes / chip.hbm_bandwidth > 10 * START
    # The input, and the results of a copy that all are under way.
    assert (1 + device_speed.LARGE_CALLS) * num_bytes < 0.6 * chip.hbm_bytes


@pytest.mark.parametrize("share", [0.52, 0.84])
def test_bandwidth_that_falls_short_of_the_data_sheet_says_so(share):
    message = shortfall(share * H200.hbm_bandwidth, H200)
    assert f"{share:.0%} of the 4800 of the data sheet" in message


def test_bandwidth_that_may_be_right_says_nothing():
    assert shortfall(0.9 * H200.hbm_bandwidth, H200) == ""
    assert shortfall(10e9, None) == ""


@pytest.mark.parametrize(("num_bytes", "enough"), [(2**28, False), (2**32, True)])
def test_a_probe_that_reads_too_little_falls_short(monkeypatch, num_bytes, enough):
    """A simulated H200, whose calls start one after the other while the earlier ones run."""
    clock = {"host": 0.0, "device": 0.0}

    def run(*_):
        clock["host"] += START
        clock["device"] = max(clock["device"], clock["host"]) + num_bytes / 4.3e12

    def timed(function, *arguments):
        begin = clock["host"]
        result = function(*arguments)
        clock["host"] = max(clock["host"], clock["device"])
        return result, clock["host"] - begin

    monkeypatch.setattr(device_speed, "timed", timed)
    monkeypatch.setattr(device_speed, "CALLS", {})
    found = num_bytes / device_speed.best_seconds(run)
    assert found <= 4.3e12
    assert (shortfall(found, H200) == "") == enough


def test_every_probe_moves_what_it_says(monkeypatch):
    moved = []

    def seconds(function, *arguments):
        moved.append((function, sum(array.nbytes for array in arguments)))
        return 1.0

    monkeypatch.setattr(device_speed, "best_seconds", seconds)
    monkeypatch.setattr(device_speed, "PROBE_BYTES", 2**20)
    speed = device_speed.measure(jnp.dtype("float32"))
    assert speed.bandwidth == 2 * 2**20  # the copy reads and writes
    assert speed.product_bandwidth == 2**20
    assert [round(total / 2**20) for _, total in moved[:3]] == [1, 1, 1]
