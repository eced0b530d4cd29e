"""Lines of progress, and waiting for what other processes do."""

import datetime
import math
import time
from collections.abc import Callable

import jax
from absl import logging

from dar_jax.common.typing import Any

REPORT_SECONDS = 5.0
"""Between two lines of progress."""
COMPILATION_EVENTS = (
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
POLL_SECONDS = 10.0
"""Between two looks for what other processes write."""
MAX_WAIT_SECONDS = 3600.0
"""For what is a matter of minutes, such as one file of all images of a set."""


class Progress:
    """Lines with the number of images that are done, the rate and the time left."""

    def __init__(self, total: int, what: str = "images", *, every: float = REPORT_SECONDS):
        """Expect `total` of `what`; say how many are done every so many seconds."""
        self._total = total
        self._what = what
        self._every = every
        self._done = 0
        self._reported = time.monotonic()
        self._clock = None
        self._compilation = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._count_compilation)
        if total:
            logging.info("0 of %d %s: compiling what is new, which can take minutes", total, what)

    def _count_compilation(self, event: str, duration_secs: float, **_: Any) -> None:
        if event in COMPILATION_EVENTS:
            self._compilation += duration_secs

    def add(self, count: int, *, told: bool = False) -> None:
        """Count a batch; say so after the first, now and then, and at the end.

        Args:
            count: of the batch.
            told: another line has said it; the first one is written all the same.
        """
        self._done += count
        now = time.monotonic()
        if self._clock is None:
            # Compilation is not part of the rate.
            self._clock = (self._done, now)
            jax.monitoring.unregister_event_duration_listener(self._count_compilation)
            logging.info(
                "%d of %d %s in %.1f s, %.1f s of it compilation",
                self._done,
                self._total,
                self._what,
                now - self._reported,
                self._compilation,
            )
        elif not told and (now - self._reported > self._every or self._done >= self._total):
            rate = (self._done - self._clock[0]) / (now - self._clock[1])
            left = datetime.timedelta(seconds=math.ceil((self._total - self._done) / rate))
            logging.info(
                "%d of %d %s, %.3g per second, %s left",
                self._done,
                self._total,
                self._what,
                rate,
                left,
            )
        elif not told:
            return
        self._reported = now


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that other processes do to the directory that all share.

    Raises:
        ValueError: it has not come after `MAX_WAIT_SECONDS`.
    """
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > MAX_WAIT_SECONDS:
            raise ValueError(f"gave up waiting for {what}; run the same command again to go on")
        logging.info("Waiting for %s", what)
        time.sleep(POLL_SECONDS)
