"""Batches of few sizes, and others under way while one is used."""

import threading

import jax
import numpy as np
import pytest

from dar_jax.common import batches
from dar_jax.common.batches import one_ahead, side_by_side


def test_one_ahead_loses_nothing():
    wanted = [[], [0], [0, 1], [0, 1, 2, 3, 4]]
    assert [list(one_ahead(iter(range(n)))) for n in (0, 1, 2, 5)] == wanted


@pytest.mark.parametrize("threads", [1, 2])
def test_side_by_side_keeps_the_order(monkeypatch, threads):
    monkeypatch.setattr(batches, "MAX_THREADS", threads)
    for count in (0, 1, 2, 7):
        made = side_by_side(lambda n: n + 1, lambda n: 10 * n, range(count), None)
        assert list(made) == [10 * (n + 1) for n in range(count)]


def test_on_a_cpu_two_are_at_work_after_the_first(monkeypatch):
    monkeypatch.setattr(batches.os, "cpu_count", lambda: 2)
    at_work, together = [], threading.Barrier(2, timeout=60)

    def fetch(number):
        at_work.append(number)
        if number:
            together.wait()  # breaks, and raises, unless another comes
        else:
            assert at_work == [0]
        return number

    assert list(side_by_side(lambda n: n, fetch, range(5), None)) == [0, 1, 2, 3, 4]


def test_devices_of_a_mesh_take_part_in_one_program_after_the_other(monkeypatch):
    monkeypatch.setattr(batches.os, "cpu_count", lambda: 2)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), "data")
    if mesh.size < 2:
        pytest.skip("needs two devices")
    here = threading.get_ident()
    threads = side_by_side(lambda n: threading.get_ident(), lambda ident: ident, range(3), mesh)
    assert set(threads) == {here}


@pytest.mark.parametrize("threads", [1, 2])
def test_a_failure_ends_all_and_takes_nothing_more(monkeypatch, threads):
    monkeypatch.setattr(batches, "MAX_THREADS", threads)
    taken = []

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    def fetch(number):
        if number == 3:
            raise ValueError("image 3: not finite")
        return number

    with pytest.raises(ValueError, match="image 3"):
        list(side_by_side(lambda n: n, fetch, items(), None))
    assert len(taken) <= 3 + 1 + 2 * threads
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]
