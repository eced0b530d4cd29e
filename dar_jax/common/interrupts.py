"""Signals that end a process: Ctrl-C (SIGINT), SIGTERM and SIGHUP.

The first one raises `Interrupted` in the main thread, so that what is half-written is removed on
the way out. A second Ctrl-C ends the process at once, also in the middle of a compilation, which
holds Python up. Training takes the first one itself, see
`parallel.distributed.PreemptionNotice`.

A thread that cannot write its file, on a full disk for instance, ends the main thread too, which
may be waiting for it.

Callbacks of the garbage collector and `__del__` drop what is raised in them: what they drop of this
is raised again a moment later.
"""

import multiprocessing
import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FAILURE = signal.SIGUSR2
"""What a thread that has failed sends to the main thread."""

RETRY_S = 0.05
LOOP_CLOSED = "Event loop is closed"
"""What callbacks of a loop say that an error has ended; the error is raised where the loop ran."""

_received: list[int] = []
_failures: list[BaseException] = []


class Interrupted(KeyboardInterrupt):
    """A signal asks for the end; `status` is the exit status that says so."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.status = status_of(number)


def install() -> None:
    """Take charge of the signals, but for those that are ignored, as `nohup` has it."""
    for number in handled():
        signal.signal(number, _interrupt)
    signal.signal(FAILURE, _raise_failure)
    threading.excepthook = _thread_failed
    sys.unraisablehook = _dropped
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()


def handled() -> tuple[signal.Signals, ...]:
    """The signals that are not ignored."""
    return tuple(n for n in SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None))


def first() -> signal.Signals | None:
    """The first signal that came."""
    return signal.Signals(_received[0]) if _received else None


def leave(message: str, status: int) -> NoReturn:
    """Write one line and end at once, without waiting for threads and other processes."""
    for child in multiprocessing.active_children():
        child.kill()
    # Another thread may be in the middle of a line.
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()
    os._exit(status)


def silence() -> None:
    """Let threads say no more: the run has ended with an error, which has been told."""
    threading.excepthook = sys.unraisablehook = _ignore_failure


def status_of(number: int) -> int:
    """The exit status of a process that a signal ended."""
    return 128 + number


def _watch(reader: int) -> None:
    """Note the signals as they come, whatever the main thread is doing."""
    while numbers := os.read(reader, 1):
        _received.extend(number for number in numbers if number in SIGNALS)
        if _received.count(signal.SIGINT) > 1:
            leave("dar_jax: stopped at once; what was saved is whole", status_of(signal.SIGINT))


def _interrupt(number: int, frame: FrameType | None) -> None:
    # While the first one unwinds the stack, others of whatever kind would only disturb it.
    for other in handled():
        signal.signal(other, _ignore)
    raise Interrupted(number)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Leave it to `_watch`, which would not see what is ignored altogether."""


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    error = failed.exc_value
    if not isinstance(error, OSError) or isinstance(error, ConnectionError):
        threading.__excepthook__(failed)
        return
    _failures.append(error)
    if len(_failures) == 1:
        signal.pthread_kill(threading.main_thread().ident or 0, FAILURE)


def _dropped(dropped: "sys.UnraisableHookArgs") -> None:
    error = dropped.exc_value
    if isinstance(error, Interrupted):
        _failures.insert(0, error)
    if error not in _failures:
        if str(error) != LOOP_CLOSED:
            sys.__unraisablehook__(dropped)
        return
    main = threading.main_thread().ident or 0
    timer = threading.Timer(RETRY_S, signal.pthread_kill, (main, FAILURE))
    timer.daemon = True
    timer.start()


def _ignore_failure(failure: object) -> None:
    """Hook that says nothing."""


def _raise_failure(number: int, frame: FrameType | None) -> None:
    if _failures:  # the signal may come from elsewhere, a job scheduler for one
        raise _failures[0]
