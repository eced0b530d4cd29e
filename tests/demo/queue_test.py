"""The queue of the demo: turns, limits, cancelling, failures; nothing here needs a model."""

import threading

import pytest

from dar_jax.demo.queue import RequestQueue, Waiting

TIMEOUT_S = 20
NUM_PIECES = 4


class Work:
    """Makes `NUM_PIECES` pieces of every request, each when it is let; fails where told to."""

    def __init__(self):
        self.let = threading.Semaphore(0)
        self.made: list[tuple[str, int]] = []
        self.closed: list[str] = []

    def generate(self, request):
        if isinstance(request, Exception):
            raise request
        try:
            for piece in range(NUM_PIECES):
                assert self.let.acquire(timeout=TIMEOUT_S)
                self.made.append((request, piece))
                yield piece
        finally:
            self.closed.append(request)

    def let_all(self):
        self.let.release(1000)


@pytest.fixture
def work():
    return Work()


@pytest.fixture
def requests(work):
    queue = RequestQueue(work.generate, max_requests=3)
    yield queue
    work.let_all()
    queue.close()


def test_requests_are_served_in_turn_and_told_their_positions(work, requests):
    tickets = [requests.submit(owner, owner) for owner in "abc"]
    first = tickets[0].updates()
    assert next(first) == Waiting(0)
    work.let_all()
    updates = [list(ticket.updates()) for ticket in tickets[1:]]
    pieces = list(range(NUM_PIECES))
    assert [update for update in first if not isinstance(update, Waiting)] == pieces
    for ahead, seen in enumerate(updates, start=1):
        positions = [update.ahead for update in seen if isinstance(update, Waiting)]
        assert sorted(set(positions), reverse=True) == list(range(ahead, -1, -1))
        assert seen[-NUM_PIECES:] == pieces
    assert work.made == [(owner, piece) for owner in "abc" for piece in pieces]


def test_full_queue_and_second_request_of_an_owner_are_refused(work, requests):
    tickets = [requests.submit(owner, owner) for owner in "abc"]
    with pytest.raises(ValueError, match=r"the queue is full \(3 requests\)"):
        requests.submit("d", "d")
    with pytest.raises(ValueError, match="your last request is not done yet"):
        requests.submit("b", "again")
    work.let_all()
    for ticket in tickets:
        list(ticket.updates())
    assert 0 in list(requests.submit("b", "again").updates())


def test_cancelling_stops_the_work_and_frees_the_owner(work, requests):
    ticket = requests.submit("a", "a")
    updates = ticket.updates()
    work.let.release()
    while next(updates) != 0:
        pass
    assert requests.cancel("a")
    assert list(updates) == []
    assert ticket.cancelled
    again = requests.submit("a", "again")
    work.let_all()
    assert list(again.updates())[-1] == NUM_PIECES - 1
    # The piece that was being made when it was cancelled is the last one.
    assert len([piece for request, piece in work.made if request == "a"]) <= 2
    assert work.closed == ["a", "again"]
    assert not requests.cancel("a")


def test_cancelled_while_it_waits_is_never_begun(work, requests):
    tickets = {owner: requests.submit(owner, owner) for owner in "abc"}
    assert requests.cancel("b")
    assert [update for update in tickets["b"].updates() if not isinstance(update, Waiting)] == []
    work.let_all()
    assert list(tickets["c"].updates())[-1] == NUM_PIECES - 1
    assert {request for request, _ in work.made} == {"a", "c"}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("temperature 9 must be less"), "temperature 9 must be less"),
        (RuntimeError("out of memory\nstack"), "generation failed: RuntimeError: out of memory$"),
    ],
)
def test_failed_request_harms_no_other(work, requests, error, message):
    work.let_all()
    tickets = [requests.submit(owner, owner) for owner in "ab"]
    bad = requests.submit("bad", error)
    with pytest.raises(ValueError, match=message):
        list(bad.updates())
    for ticket in (*tickets, requests.submit("bad", "better")):
        assert list(ticket.updates())[-1] == NUM_PIECES - 1


def test_close_ends_everything(work):
    requests = RequestQueue(work.generate, max_requests=3)
    tickets = [requests.submit(owner, owner) for owner in "ab"]
    closing = threading.Thread(target=requests.close)
    closing.start()
    for ticket in tickets:
        assert [update for update in ticket.updates() if not isinstance(update, Waiting)] == []
    work.let_all()
    closing.join(TIMEOUT_S)
    assert not closing.is_alive()
    assert "b" not in work.closed
