"""Jobs of several processes: how they meet, agree on what to run, and stop together.

The engine is `jax.distributed`; a single process needs none of it.
"""

import importlib.util
import json
import os
import pathlib
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from dar_jax.common import interrupts, storage, tree

TPU_VARIABLES = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "MEGASCALE_COORDINATOR_ADDRESS")
TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")
GRACE_S = 3600
"""JAX ends the process with a stack trace once its own time is up: it gets more than we wait."""
SHUTDOWN_TIMEOUT_S = 60
"""How long a process that fails alone waits for the others before it leaves."""
STATUS_LOST_PEER = 1
ABSENT = "(absent)"
T = TypeVar("T")


class Preempted(Exception):  # noqa: N818, no error
    """The run was told to stop, and can go on from what it saved."""


def initialize(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    timeout_s: float,
) -> None:
    """Join the processes of a job; must come before anything that uses a device.

    Without arguments, a TPU pod or a SLURM step of several tasks tells them, and anywhere else
    this does nothing.

    Args:
        coordinator_address: HOST:PORT at which process 0 listens and the others find it.
        num_processes: of the job.
        process_id: of this one, from 0.
        timeout_s: how long to wait for the others, in seconds.

    Raises:
        ValueError: the arguments make no sense, or the others did not answer in time.
    """
    given = (coordinator_address, num_processes, process_id)
    if given == (None, None, None):
        if not _in_cluster():
            return
        method = None
    else:
        _check(*given)
        method = "deactivate"
    arguments = dict(
        coordinator_address=coordinator_address,
        num_processes=num_processes,
        process_id=process_id,
        cluster_detection_method=method,
        initialization_timeout=int(timeout_s) + GRACE_S,
        shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
    )
    _join(arguments, timeout_s)


def _in_cluster() -> bool:
    slurm = "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1
    pod = any(name in os.environ for name in TPU_VARIABLES)
    chips = any(pathlib.Path(path).exists() for path in TPU_DEVICES)
    return slurm or pod or (chips and importlib.util.find_spec("libtpu") is not None)


def _check(address: str | None, count: int | None, index: int | None) -> None:
    if address is None or count is None or index is None:
        raise ValueError(
            "coordinator_address, num_processes and process_id belong together; "
            f"got {address}, {count}, {index}"
        )
    if not address.rpartition(":")[2].isdigit():
        raise ValueError(f"coordinator_address {address!r} must be HOST:PORT")
    if not 0 <= index < count:
        raise ValueError(f"process_id {index} must be from 0 to num_processes - 1 = {count - 1}")


def _join(arguments: Mapping[str, Any], timeout_s: float) -> None:
    errors = []

    def connect() -> None:
        try:
            jax.distributed.initialize(**arguments)
        except Exception as error:  # raised again below, where it can be caught
            errors.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout_s)
    where = arguments["coordinator_address"] or "the address that the cluster gives"
    if thread.is_alive():
        raise ValueError(
            f"the job's processes did not all meet at {where} within {timeout_s:g} s; check that "
            "every process runs and reaches process 0 there, or raise --join_timeout"
        )
    if not errors:
        return
    if isinstance(errors[0], RuntimeError | ValueError):
        raise ValueError(f"cannot join the job at {where}: {errors[0]}") from errors[0]
    raise errors[0]


def check_same_everywhere(settings: Mapping[str, Any]) -> None:
    """Raise ValueError, on all processes, unless all were started with equal settings.

    Args:
        settings: what has to be equal: nested, with JSON types and tuples as leaves.
    """
    if not jax.distributed.is_initialized():
        return
    everywhere = [json.loads(text) for text in gather_texts(json.dumps(dict(settings)))]
    first = tree.flatten(everywhere[0])
    for process, other in enumerate(map(tree.flatten, everywhere)):
        for name in sorted(first.keys() | other.keys()):
            values = [flat.get(name, ABSENT) for flat in (first, other)]
            if values[0] != values[1]:
                raise ValueError(
                    f"process {process} has {name.replace('/', '.')}={values[1]!r}, process 0 has "
                    f"{values[0]!r}; start all processes with the same command"
                )


def gather_texts(text: str) -> list[str]:
    """Return the text of every process, on every process."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.asarray(len(data)))
    rows = multihost_utils.process_allgather(np.pad(data, (0, max(lengths) - len(data))))
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


def of_first(compute: Callable[[], T]) -> T:
    """Return, on every process, what process 0 computes: JSON types.

    Raises:
        Exception: what process 0 raises; on the others a ValueError that says the same.
    """
    if jax.process_count() == 1:
        return compute()
    text, raised = "", None
    if jax.process_index() == 0:
        try:
            text = json.dumps({"value": compute()})
        except Exception as error:  # raised again once the others know
            raised, is_known = error, isinstance(error, ValueError | OSError)
            reason = str(error) if is_known else f"{type(error).__name__}: {error}"
            text = json.dumps({"error": reason})
    told = json.loads(gather_texts(text)[0])
    if raised is not None:
        raise raised
    if "error" in told:
        raise ValueError(told["error"])
    return told["value"]


def check_shared(directory: storage.Path) -> None:
    """Raise ValueError, on all processes, unless `directory` is the same one to all of them.

    Process 0 leaves a file there for a moment, of a name that no host can have seen before.
    """
    if jax.process_count() == 1:
        return

    def leave_token() -> str:
        name = f".shared-{secrets.token_hex(8)}"
        (directory / name).touch()
        return name

    token = directory / of_first(leave_token)
    seen = gather_texts(str(token.exists()))
    if jax.process_index() == 0:
        token.unlink()
    blind = [process for process, text in enumerate(seen) if text != str(True)]
    if blind:
        raise ValueError(
            f"workdir {directory} is on process {', '.join(map(str, blind))} another directory "
            "than on process 0; use one that all hosts share"
        )


def leave(message: str) -> NoReturn:
    """End this process at once, with one line, because another one of the job is lost.

    A normal exit would wait for the lost one, until JAX aborts it with a stack trace.
    """
    sys.stdout.flush()
    sys.stderr.write(f"dar_jax: error: {' '.join(message.split())}\n")
    sys.stderr.flush()
    os._exit(STATUS_LOST_PEER)


def wait_for_all(what: str) -> None:
    """Wait until every process has come as far as `what`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


class PreemptionNotice:
    """Catches Ctrl-C, SIGHUP and SIGTERM, which schedulers send before they take a machine away.

    A context manager; where the processes form a job, JAX catches SIGTERM from the start, and the
    others end this process.
    """

    def __init__(self):
        self._received = False
        self._previous = {}

    def reached(self, step: int) -> bool:
        """Tell whether to save and stop after this step; the same on all processes.

        Must be called after every step: the processes agree on the first step that none of them
        has finished yet.
        """
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received

    def __enter__(self) -> "PreemptionNotice":
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and not jax.distributed.is_initialized():
            for number in interrupts.handled():
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = True
