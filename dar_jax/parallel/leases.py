"""Leases: claims on names that last while their owner is alive, in a folder or a bucket.

    .lease-00000064-0       process, host and a count, which its owner raises every few seconds
    .lease-00000064-1       of who took it over, when that count stood still for a minute

No clocks are compared: who waits measures by its own how long a count has stood. Where the owner
was a process of the same host that is no more, nobody waits: hosts are told apart by their name and
by what the system says of itself, as many have one name.
"""

import errno
import os
import re
import threading
import time
import uuid
from collections.abc import Callable
from types import TracebackType

from absl import logging

from dar_jax.common import storage
from dar_jax.common.files import host, is_alive, read_regular

RENEW_SECONDS = 10.0
GONE_SECONDS = 60.0
"""After which the owner of a lease that was not renewed is taken for gone."""
MAX_BYTES = 2**12
_NAME = re.compile(r"\.lease-(.+)-(\d+)")
_OWNER = re.compile(r"process (\d+) on (\S+) ")


class Leases:
    """The leases of this process in a directory; a context manager, which renews and returns them.

    Safe to use from several threads.
    """

    def __init__(self, directory: storage.Path, on_lost: Callable[[str], None] | None = None):
        """Hold no lease yet.

        Args:
            directory: shared by all who take them.
            on_lost: called, by a thread, with the name of a lease that another has taken over.
        """
        self._directory = directory
        self._on_lost = on_lost or (lambda name: None)
        self._owner = f"process {os.getpid()} on {host()} ({uuid.uuid4().hex[:8]})"
        self._held: dict[str, int] = {}
        self._seen: dict[str, tuple[str, float]] = {}
        self._alive: set[str] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> "Leases":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closed.set()
        self._thread.join()
        self.release_all()

    def take(self, name: str) -> str:
        """Take a lease; return who has it instead, or "" if it is ours now.

        Raises:
            OSError: the directory cannot be read or written.
        """
        numbers = sorted(self._numbers().get(name, []))
        number = numbers[-1] + 1 if numbers else 0
        if numbers:
            owner = self._owner_of(name, numbers[-1])
            if owner:
                return owner
            logging.warning("Taking over %s: its owner is gone", name)
        path = self._path(name, number)
        # A bucket may have created it and been cut off before it said so: then it is there.
        if not storage.create(path, self._text(0)) and self._read(path) != self._text(0):
            return "another process, just now"
        with self._lock:
            self._held[name] = number
        for old in numbers:
            self._path(name, old).unlink(missing_ok=True)
        return ""

    def wait_for(self, name: str) -> str:
        """Take a lease as soon as its owner is known to be gone.

        Returns:
            "", or an owner that is known to be alive.
        """
        end = time.monotonic() + 2 * GONE_SECONDS
        while owner := self.take(name):
            if name in self._alive or time.monotonic() > end:
                return owner
            logging.info("Waiting to see whether %s is still there", owner)
            time.sleep(RENEW_SECONDS / 2)
        return ""

    def release(self, name: str) -> None:
        """Return a lease."""
        with self._lock:
            number = self._held.pop(name, None)
            if number is not None:
                self._path(name, number).unlink(missing_ok=True)

    def held(self) -> list[str]:
        """Names of the leases that this process has."""
        with self._lock:
            return [*self._held]

    def release_all(self) -> None:
        """Return all leases."""
        for name in self.held():
            self.release(name)

    def sweep(self) -> None:
        """Delete all leases of the directory: nothing is left to claim."""
        for name, numbers in self._numbers().items():
            for number in numbers:
                self._path(name, number).unlink(missing_ok=True)

    def _path(self, name: str, number: int) -> storage.Path:
        return self._directory / f".lease-{name}-{number}"

    def _text(self, count: int) -> str:
        return f"{self._owner} {count}\n"

    def _numbers(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for path in storage.entries(self._directory):
            if match := _NAME.fullmatch(path.name):
                found.setdefault(match[1], []).append(int(match[2]))
        return found

    def _owner_of(self, name: str, number: int) -> str:
        """Say who has a lease; "" if it was not renewed for long, or its owner is no more."""
        path = self._path(name, number)
        text = self._read(path)
        if text is None:
            return "a process that is just returning it"
        match = _OWNER.match(text)
        if match and match[2] == host() and not is_alive(int(match[1])):
            return ""
        known, since = self._seen.get(path.name, (None, 0.0))
        if text != known:
            since = time.monotonic()
            self._seen[path.name] = (text, since)
            if known is not None:
                self._alive.add(name)
        if time.monotonic() - since > GONE_SECONDS:
            return ""
        return text.rpartition(" ")[0] if match else f"unknown ({text[:40]!r} in {path.name})"

    def _read(self, path: storage.Path) -> str | None:
        """The text of a lease, whatever it is; None if it is gone."""
        try:
            return read_regular(path, MAX_BYTES).decode(errors="replace")
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise
            return f"more than {MAX_BYTES:,} bytes"

    def _renew(self) -> None:
        count = 0
        while not self._closed.wait(RENEW_SECONDS):
            count += 1
            try:
                numbers = self._numbers()
                with self._lock:
                    for name, number in [*self._held.items()]:
                        if max(numbers.get(name, [number])) > number:
                            del self._held[name]
                            self._on_lost(name)
                        else:
                            self._path(name, number).write_text(self._text(count))
            except Exception as error:  # of any library: the next time may do
                logging.warning("Leases in %s cannot be renewed: %s", self._directory, error)
