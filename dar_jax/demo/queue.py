"""One thread that serves the requests of many, in turns.

There is one device, so there is one request at a time; the others wait and are told how many are
before them. A request ends when its stream does, when it fails, or when its owner cancels it: then
nothing more of it is computed, and it harms no other.
"""

import collections
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

from absl import logging


class Waiting(NamedTuple):
    """Requests that are served before this one; at 0 its turn has come."""

    ahead: int


class Ticket:
    """A request in the queue, as its owner sees it."""

    def __init__(self, owner: str, request: Any):
        self.owner = owner
        self.request = request
        self.cancelled = False
        self._updates: queue.SimpleQueue = queue.SimpleQueue()

    def tell(self, update: Any) -> None:
        """Hand an update to the owner; None is the end and a `ValueError` what went wrong."""
        self._updates.put(update)

    def updates(self) -> Iterator[Any]:
        """Yield every `Waiting` and everything that is generated, as it comes.

        Ends when the request is done or cancelled.

        Raises:
            ValueError: the request failed.
        """
        while (update := self._updates.get()) is not None:
            if isinstance(update, ValueError):
                raise update
            yield update


class RequestQueue:
    """Requests of several owners, one at a time each."""

    def __init__(self, generate: Callable[[Any], Generator], max_requests: int):
        """Start the thread.

        Args:
            generate: makes what one request asks for, piece by piece, and stops when it is closed.
            max_requests: that are served or wait at the same time.
        """
        self._generate = generate
        self.max_requests = max_requests
        self._changed = threading.Condition()
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._served: Ticket | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="generation", daemon=True)
        self._thread.start()

    def submit(self, owner: str, request: Any) -> Ticket:
        """Put a request at the end of the queue.

        Raises:
            ValueError: the queue is full, or the owner is in it already.
        """
        with self._changed:
            if any(ticket.owner == owner for ticket in self._active()):
                raise ValueError("your last request is not done yet: wait for it or cancel it")
            if len(self._waiting) + (self._served is not None) >= self.max_requests:
                raise ValueError(
                    f"the queue is full ({self.max_requests} requests): try again in a while"
                )
            ticket = Ticket(owner, request)
            ticket.tell(Waiting(len(self._waiting) + (self._served is not None)))
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def cancel(self, owner: str) -> bool:
        """Take the owner's request out of the queue, or stop it; return whether there was one.

        What the device is at is finished; nothing further is begun.
        """
        with self._changed:
            for ticket in self._active():
                if ticket.owner == owner:
                    ticket.cancelled = True
                    ticket.tell(None)
                    if ticket is not self._served:
                        self._waiting.remove(ticket)
                        self._tell_positions()
                    return True
        return False

    def close(self) -> None:
        """Cancel everything and end the thread."""
        with self._changed:
            for ticket in self._active():
                ticket.cancelled = True
                ticket.tell(None)
            self._waiting.clear()
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _active(self) -> list[Ticket]:
        served = [] if self._served is None or self._served.cancelled else [self._served]
        return [*served, *self._waiting]

    def _tell_positions(self) -> None:
        for ahead, ticket in enumerate(self._waiting, start=self._served is not None):
            ticket.tell(Waiting(ahead))

    def _serve(self) -> None:
        while (ticket := self._next()) is not None:
            outcome = self._run(ticket)
            # First, so that an owner who is told of the end may ask again.
            with self._changed:
                self._served = None
            ticket.tell(outcome)

    def _next(self) -> Ticket | None:
        """Wait for a request and take it; None when the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            self._served = self._waiting.popleft()
            self._served.tell(Waiting(0))
            self._tell_positions()
            return self._served

    def _run(self, ticket: Ticket) -> ValueError | None:
        """Generate until the end or until cancelled; return what went wrong."""
        started, count = time.monotonic(), 0
        try:
            with contextlib.closing(self._generate(ticket.request)) as pieces:
                for piece in pieces:
                    if ticket.cancelled:
                        break
                    ticket.tell(piece)
                    count += 1
        except ValueError as error:
            return error
        except Exception as error:  # whatever one request does, the others are served
            logging.exception("A request failed")
            reason = next(iter(str(error).splitlines()), "")
            return ValueError(f"generation failed: {type(error).__name__}: {reason}")
        seconds = time.monotonic() - started
        end = "cancelled" if ticket.cancelled else "done"
        logging.info("Request %s after %d previews and %.2f s", end, count, seconds)
        return None
