"""The scheduler, with a batch that draws squares."""

import queue
import time

import pytest

from dar_jax.models.dar.options import DarSampling
from dar_jax.serving.drawing import Request
from dar_jax.serving.errors import ApiError
from tests.serving.fake import NUM_GROUPS, FakeBatch

Engine = pytest.importorskip(
    "dar_jax.serving.engine", reason="counters need pip install 'dar-jax[serve]'"
).Engine
TIMEOUT = 20
"""Seconds that no test needs."""


def started(batch, max_waiting=8, ttl=60.0):
    engine = Engine(batch, max_waiting=max_waiting, ttl=ttl)
    engine.start()
    while engine.status == "starting":
        pass
    return engine


@pytest.fixture
def batch():
    return FakeBatch()


@pytest.fixture
def engine(batch):
    engine = started(batch)
    yield engine
    batch.gate.set()
    engine.close()


def submit(engine, *labels, owner="me", previews=()):
    """Return the ticket and the queue of its updates."""
    updates = queue.Queue()
    request = Request(labels, 0, DarSampling(), frozenset(previews))
    return engine.submit(owner, request, updates.put), updates


def until_none(updates):
    found = []
    while (update := updates.get(timeout=TIMEOUT)) is not None:
        found.append(update)
    return found


def test_previews_come_in_order_and_the_image_once(engine):
    _, updates = submit(engine, 1, 2, previews=(1, 3))
    pieces = until_none(updates)
    for image in range(2):
        own = [piece for piece in pieces if piece.image == image]
        assert [piece.group for piece in own] == [1, 3, NUM_GROUPS]
        assert [piece.is_last for piece in own] == [False, False, True]
    assert updates.empty() and engine.is_idle


def test_requests_join_while_others_are_drawn(engine, batch):
    batch.gate.clear()
    _, first = submit(engine, 1, owner="a")
    _, second = submit(engine, 2, owner="b")
    batch.gate.set()
    until_none(first), until_none(second)
    assert max(len(turn) for turn in batch.turns) == 2
    joined = next(turn for turn in batch.turns if len(turn) == 2)
    assert dict(joined)[2] == 0


def test_a_finished_image_makes_room_at_the_next_boundary(engine, batch):
    batch.gate.clear()
    tickets = [submit(engine, label) for label in range(4)]
    batch.gate.set()
    for _, updates in tickets:
        assert len(until_none(updates)) == 1
    steps = sum(map(len, batch.turns))
    assert steps == 4 * NUM_GROUPS and len(batch.turns) <= steps // 2 + 1


def test_owners_take_turns(batch):
    batch.size = 1
    batch.gate.clear()
    engine = started(batch)
    _, many = submit(engine, 1, 1, 1, 1, owner="greedy")
    _, one = submit(engine, 2, owner="modest")
    batch.gate.set()
    until_none(many), until_none(one)
    order = [turn[0][0] for turn in batch.turns[::NUM_GROUPS]]
    assert order.index(2) <= 1
    engine.close()


def test_full_queue_is_refused_and_no_owner_fills_it_alone(engine, batch):
    batch.gate.clear()
    _, first = submit(engine, 1, 1, owner="a")
    while not engine._active:
        pass
    submit(engine, 2, 2, 2, 2, owner="a")
    with pytest.raises(ApiError, match="4 wait, 4 of them your own") as refused:
        submit(engine, 2, owner="a")
    assert refused.value.status == 429
    submit(engine, 3, 3, 3, 3, owner="b")
    with pytest.raises(ApiError, match="8 wait, 0 of them your own"):
        submit(engine, 2, owner="c")
    batch.gate.set()
    until_none(first)


def test_cancelled_images_leave_and_others_go_on(engine, batch):
    batch.gate.clear()
    ticket, gone = submit(engine, 1, 1, 1, owner="a")
    _, stays = submit(engine, 2, owner="b")
    engine.cancel(ticket)
    batch.gate.set()
    assert until_none(gone) == []
    assert len(until_none(stays)) == 1
    assert sum(turn.count((1, 0)) for turn in batch.turns) <= 1
    assert engine.is_idle


def test_late_requests_are_told_so(batch):
    engine = started(batch, ttl=0.05)
    batch.gate.clear()
    _, updates = submit(engine, 1, 1, 1)
    time.sleep(0.1)
    batch.gate.set()
    (error,) = until_none(updates)
    assert error.status == 504 and "longer than 0.05 s" in error.message
    engine.close()


def test_a_request_whose_image_never_comes_is_told_so(batch, monkeypatch):
    draw = batch.draw
    monkeypatch.setattr(batch, "draw", lambda active: draw(active)[:0])
    engine = started(batch, ttl=0.2)
    _, updates = submit(engine, 1)
    (error,) = until_none(updates)
    assert error.status == 504
    engine.close()


def test_a_turn_that_fails_harms_no_later_request(engine, batch):
    batch.broken = 3
    _, updates = submit(engine, 3)
    (error,) = until_none(updates)
    assert error.status == 500
    assert error.message == "drawing failed: RuntimeError: out of memory"
    _, updates = submit(engine, 1)
    assert len(until_none(updates)) == 1
    assert batch.num_resets == 1 and engine.status == "ready"


def test_draining_finishes_what_is_open_and_takes_nothing_new(engine, batch):
    batch.gate.clear()
    _, updates = submit(engine, 1)
    engine.drain()
    with pytest.raises(ApiError, match="shutting down"):
        submit(engine, 1)
    batch.gate.set()
    assert len(until_none(updates)) == 1


def test_closing_tells_whoever_waits(engine, batch):
    batch.gate.clear()
    _, updates = submit(engine, 1, 1, 1, 1)
    engine._closed = True
    batch.gate.set()
    engine.close()
    assert until_none(updates)[-1].status == 503


def test_failing_to_start_is_kept(batch):
    batch.warm_up = lambda: 1 / 0
    engine = Engine(batch, max_waiting=2, ttl=1.0)
    engine.start()
    engine._thread.join(TIMEOUT)
    assert engine.status == "failed" and isinstance(engine.failure, ZeroDivisionError)
    with pytest.raises(ApiError) as refused:
        submit(engine, 1)
    assert refused.value.status == 503
