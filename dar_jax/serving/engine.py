"""Continuous batching: one thread draws the images of many requests, a group of tokens at a time.

Every turn decodes one group for all images that are under way, wherever each of them stands, and
takes the denoising steps that the group completes. Between two turns images of new requests join,
finished, cancelled and late ones leave. Owners take turns in joining, so that who asks for much
waits for it. A turn is dispatched while the device is still at the one before, whose previews are
handed out next: the device never waits for the host.
"""

import collections
import threading
import time
from collections.abc import Callable
from typing import Any

from absl import logging

from dar_jax.serving.config import MEGABYTE, OWNERS_SHARE
from dar_jax.serving.drawing import Batch, Drawn, ImageInWork, Piece
from dar_jax.serving.errors import ApiError
from dar_jax.serving.metrics import Metrics

SHUTTING_DOWN = "the server is shutting down: ask another one"


class Ticket:
    """A request in the engine.

    Attributes:
        owner: whose it is.
        request: what is asked for.
        tell: gets every `Piece`, an `ApiError` if the request fails, and None in the end; called
            by the engine's thread, which it must not hold up.
        submitted: when, by the monotonic clock.
        missing: images that are not done.
        has_preview: whether something has been handed out.
    """

    def __init__(self, owner: str, request: Any, tell: Callable[[Any], None]):
        self.owner = owner
        self.request = request
        self.tell = tell
        self.submitted = time.monotonic()
        self.missing = request.count
        self.has_preview = False


class Engine:
    """Draws the images of many requests side by side.

    Attributes:
        batch: what draws them.
        metrics: counts what happens.
        failure: what ended the thread before its time, or None.
    """

    def __init__(
        self, batch: Batch, *, max_waiting: int, ttl: float, metrics: Metrics | None = None
    ):
        """Prepare; nothing is compiled before `start`.

        Args:
            batch: draws.
            max_waiting: most images that wait.
            ttl: seconds after which a request is given up.
            metrics: of the service.
        """
        self.batch = batch
        self.metrics = metrics or Metrics()
        self.failure: BaseException | None = None
        self._max_waiting = max_waiting
        self._ttl = ttl
        self._changed = threading.Condition()
        self._open: set[Ticket] = set()
        self._active: dict[int, ImageInWork] = {}
        self._waiting: collections.OrderedDict[str, collections.deque[ImageInWork]]
        self._waiting = collections.OrderedDict()
        self._ready = self._draining = self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def status(self) -> str:
        """What it is at: "starting", "ready", "draining" or "failed"."""
        if self.failure is not None:
            return "failed"
        if self._draining:
            return "draining"
        return "ready" if self._ready else "starting"

    @property
    def is_idle(self) -> bool:
        """Whether no request is open."""
        with self._changed:
            return not self._open

    def start(self) -> None:
        """Begin to compile, and then to draw, in a thread."""
        self._thread.start()

    def submit(self, owner: str, request: Any, tell: Callable[[Any], Any]) -> Ticket:
        """Take a request; its pieces go to `tell`, see `Ticket`.

        Raises:
            ApiError: the queue is full, or the engine does not take requests.
        """
        ticket = Ticket(owner, request, tell)
        with self._changed:
            if self.status != "ready":
                why = SHUTTING_DOWN if self._draining else "the server is not ready: try again"
                raise ApiError(503, why, code="not_ready")
            waiting, own = self._num_waiting(), len(self._waiting.get(owner, ()))
            of_owner = max(1, self._max_waiting // OWNERS_SHARE)
            if ticket.missing > min(self._max_waiting - waiting, of_owner - own):
                raise ApiError(
                    429,
                    f"the queue takes no {ticket.missing} more of yours: {waiting} wait, "
                    f"{own} of them your own; try again in a while",
                    code="queue_full",
                )
            self._open.add(ticket)
            images = [ImageInWork(request, index, ticket) for index in range(ticket.missing)]
            self._waiting.setdefault(owner, collections.deque()).extend(images)
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Draw nothing more of a request; what the device is at is finished."""
        with self._changed:
            if ticket in self._open:
                self._end(ticket, "cancelled", None)

    def num_before(self, ticket: Ticket) -> int:
        """Count the requests that came before this one and are not done."""
        with self._changed:
            return sum(other.submitted < ticket.submitted for other in self._open)

    def drain(self) -> None:
        """Take no more requests; those that are open go on."""
        self._draining = True

    def close(self) -> None:
        """Tell whoever still waits that there will be nothing, and end the thread."""
        with self._changed:
            self._draining = self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        started = time.monotonic()
        try:
            self.batch.warm_up()
            logging.info(
                "Ready after %.1f s: up to %d images at a time, for which there are %.0f MB",
                *(time.monotonic() - started, self.batch.size, self.batch.num_bytes / MEGABYTE),
            )
            self._ready = True
            drawn: list[Drawn] = []
            while not self._closed:
                drawn = self._turn(drawn)
        except BaseException as error:  # whoever asks is told; see `failure`
            logging.exception("The engine has ended")
            self.failure = error
        with self._changed:
            self._draining = True
            for ticket in list(self._open):
                self._end(ticket, "shutdown", ApiError(503, SHUTTING_DOWN, code="not_ready"))

    def _turn(self, drawn: list[Drawn]) -> list[Drawn]:
        """Dispatch a turn, wait for what the last one drew, and hand that out."""
        following: list[Drawn] = []
        try:
            self._wait(bool(drawn))
            following = self._draw()
            pieces = [(one.image.ticket, self._fetch(one)) for one in drawn if self._is_wanted(one)]
        except Exception as error:  # whatever happens in a turn, later requests are served
            logging.exception("A turn failed")
            reason = next(iter(str(error).splitlines()), "")
            failed = ApiError(500, f"drawing failed: {type(error).__name__}: {reason}")
            with self._changed:
                images = [*self._active.values(), *(one.image for one in (*drawn, *following))]
                for ticket in {image.ticket for image in images} & self._open:
                    self._end(ticket, "failed", failed)
                self._active.clear()
            self.batch.reset()
            return []
        for ticket, piece in pieces:
            self._hand_out(ticket, piece)
        return following

    def _is_wanted(self, drawn: Drawn) -> bool:
        is_last = drawn.group == self.batch.num_groups
        wanted = is_last or drawn.group in drawn.image.request.preview_groups
        return wanted and drawn.image.ticket in self._open

    def _fetch(self, drawn: Drawn) -> Piece | ApiError:
        try:
            return self.batch.fetch(drawn)
        except ValueError as error:
            return ApiError(500, str(error))

    def _wait(self, is_at_work: bool) -> None:
        """Wait for something to do; let images leave and join."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or is_at_work or self._waiting or self._active,
                timeout=self._ttl if self._open else None,
            )
            self._drop()
            self._join()
            self.metrics.waiting.set(self._num_waiting())
            self.metrics.active.set(len(self._active))

    def _drop(self) -> None:
        """Let images of late and cancelled requests leave."""
        now = time.monotonic()
        for ticket in list(self._open):
            if now - ticket.submitted > self._ttl:
                late = f"the request has taken longer than {self._ttl:g} s: ask for fewer images"
                self._end(ticket, "late", ApiError(504, late, code="too_late"))
        for lane in [n for n, image in self._active.items() if image.ticket not in self._open]:
            del self._active[lane]
        for owner, queue in list(self._waiting.items()):
            left = collections.deque(image for image in queue if image.ticket in self._open)
            self._waiting[owner] = left
            if not left:
                del self._waiting[owner]

    def _join(self) -> None:
        """Give the free lanes to images that wait, of one owner after the other."""
        for lane in range(self.batch.size):
            if lane in self._active:
                continue
            if not self._waiting:
                return
            owner, queue = self._waiting.popitem(last=False)
            self._active[lane] = queue.popleft()
            if queue:
                self._waiting[owner] = queue  # behind the others

    def _draw(self) -> list[Drawn]:
        """Dispatch a group of all images in lanes; those that end with it leave."""
        if not self._active:
            return []
        drawn = self.batch.draw(self._active)
        with self._changed:
            for lane, image in list(self._active.items()):
                if image.group == self.batch.num_groups:
                    del self._active[lane]
        return drawn

    def _hand_out(self, ticket: Ticket, piece: Piece | ApiError) -> None:
        with self._changed:
            if ticket not in self._open:
                return
            if isinstance(piece, ApiError):
                self._end(ticket, "failed", piece)
                return
            seconds = time.monotonic() - ticket.submitted
            if not ticket.has_preview:
                ticket.has_preview = True
                self.metrics.first_preview.observe(seconds)
            ticket.tell(piece)
            if piece.is_last:
                ticket.missing -= 1
                self.metrics.images.inc()
                self.metrics.finished.observe(seconds)
            if not ticket.missing:
                self._open.discard(ticket)
                ticket.tell(None)

    def _end(self, ticket: Ticket, reason: str, error: ApiError | None) -> None:
        """End a request before its time; under the lock."""
        self._open.discard(ticket)
        self.metrics.dropped.labels(reason).inc(ticket.missing)
        if error is not None:
            ticket.tell(error)
        ticket.tell(None)

    def _num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))
