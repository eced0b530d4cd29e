"""Leases, in a folder and in a bucket: one owner, taken over when it is gone."""

import itertools
import os
import socket
import subprocess
import time

import pytest

from dar_jax.common import storage
from dar_jax.common.files import host
from dar_jax.parallel import leases
from dar_jax.parallel.leases import Leases


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(leases, "GONE_SECONDS", 0.5)


def names(anywhere):
    return sorted(path.name for path in storage.entries(anywhere))


def test_one_has_it_until_it_is_returned(anywhere):
    with Leases(anywhere) as first, Leases(anywhere) as second:
        assert first.take("a") == ""
        assert f"process {os.getpid()} on {socket.gethostname()}-" in second.take("a")
        assert second.take("b") == ""
        first.release("a")
        assert second.take("a") == ""
    assert names(anywhere) == []


def test_renewed_lease_is_kept_for_longer_than_its_time(anywhere):
    with Leases(anywhere) as first, Leases(anywhere) as second:
        first.take("a")
        end = time.monotonic() + 3 * leases.GONE_SECONDS
        while time.monotonic() < end:
            assert second.take("a") != ""
            time.sleep(0.1)
        assert second.wait_for("a").startswith("process ")


@pytest.mark.parametrize(
    "text", ["process 1 on elsewhere (0) 7\n", "garbage \xff\n", "", "long" * leases.MAX_BYTES]
)
def test_lease_that_nobody_renews_is_taken_over(anywhere, text):
    storage.create(anywhere / ".lease-a-3", text)
    with Leases(anywhere) as mine:
        assert mine.take("a") != ""
        assert mine.wait_for("a") == ""
        assert names(anywhere) == [".lease-a-4"]


def test_lease_of_a_dead_process_of_this_host_is_taken_over_at_once(anywhere):
    dead = subprocess.Popen(["true"])
    dead.wait()
    storage.create(anywhere / ".lease-a-0", f"process {dead.pid} on {host()} (0) 1")
    with Leases(anywhere) as mine:
        assert mine.take("a") == ""


def test_process_of_another_host_of_the_same_name_is_waited_for(anywhere):
    dead = subprocess.Popen(["true"])
    dead.wait()
    other = f"process {dead.pid} on {socket.gethostname()}-0123abcd (0)"
    storage.create(anywhere / ".lease-a-0", f"{other} 1\n")
    with Leases(anywhere) as mine:
        assert mine.take("a") == other


def test_lease_that_was_created_by_a_request_without_an_answer_is_held(anywhere, monkeypatch):
    create = storage.create
    monkeypatch.setattr(storage, "create", lambda *arguments: create(*arguments) and False)
    with Leases(anywhere) as mine, Leases(anywhere) as other:
        assert mine.take("a") == ""
        assert other.take("a").startswith(f"process {os.getpid()} on ")
        monkeypatch.setattr(storage, "create", lambda *arguments: False)
        assert other.take("b") == "another process, just now"
    assert names(anywhere) == []


def test_clocks_of_hosts_do_not_matter(anywhere, monkeypatch):
    skews = itertools.cycle([0.0, 1e6, -1e6])
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + next(skews))
    with Leases(anywhere) as first, Leases(anywhere) as second:
        first.take("a")
        end = time.monotonic() + 2 * leases.GONE_SECONDS
        while time.monotonic() < end:
            assert second.take("a") != ""
            time.sleep(0.1)


def test_owner_that_was_silent_learns_that_it_lost_the_lease(anywhere):
    lost = []
    with Leases(anywhere, on_lost=lost.append) as first:
        first.take("a")
        storage.create(anywhere / ".lease-a-1", "process 1 on elsewhere (0) 0")
        end = time.monotonic() + 5
        while not lost and time.monotonic() < end:
            time.sleep(0.02)
    assert lost == ["a"]
    assert ".lease-a-1" in names(anywhere), "that of the new owner"
