"""Compiled programs that are kept from run to run, and compiled side by side."""

import concurrent.futures
import contextlib
import hashlib
import os
import pathlib
import platform
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
from absl import logging
from jax.experimental.compilation_cache import compilation_cache

OFF = "off"
FOLDER = "dar_jax/compiled"
MAX_BYTES = 2**32
"""Of all programs that are kept; the oldest go first."""
CPU_INFO = pathlib.Path("/proc/cpuinfo")
CPU_KEYS = ("model name", "flags", "Features", "CPU part")
_COMPILED: set[Hashable] = set()
"""Keys of `compile_once`. Of the whole process, as what `jax.jit` keeps of its functions is."""


def keep_programs(setting: str) -> None:
    """Let JAX keep what it compiles, and find what an earlier run has compiled.

    JAX files a program by its code, the versions of JAX and the compiler, its flags and the
    devices. A program for the CPU consists of this one's instructions, too: each kind of CPU has a
    folder of its own.

    Args:
        setting: a directory; "off"; or empty: `dar_jax/compiled` in the user's cache folder
            (`XDG_CACHE_HOME`, or `~/.cache`), unless JAX's own `JAX_COMPILATION_CACHE_DIR` names
            another. `JAX_ENABLE_COMPILATION_CACHE=false` turns it off as well.

    Raises:
        ValueError: the directory that is named cannot be used.
    """
    if setting == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
    if not jax.config.values["jax_enable_compilation_cache"]:
        return
    # A run has dozens of programs that take less than JAX's least, one second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if jax.config.values["jax_compilation_cache_dir"] and not setting:
        return
    try:
        user = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        directory = pathlib.Path(setting or pathlib.Path(user, FOLDER)).absolute()
        directory /= cpu_fingerprint()
        directory.mkdir(parents=True, exist_ok=True)
        kept = _remove_oldest(directory)
    except (OSError, RuntimeError) as error:  # the second where there is no home
        if setting:
            raise ValueError(
                f"config.compute.cache={setting!r} cannot be used: {error}; name another "
                "directory, or off"
            ) from error
        logging.warning("Compiled programs are not kept: %s", error)
        return
    compilation_cache.set_cache_dir(str(directory))
    compilation_cache.reset_cache()  # whatever has been compiled before
    logging.info("Compiled programs are kept in %s, which has %d", directory, kept)


def once() -> dict[str, int] | None:
    """Compiler options of a program that runs once: CPUs take longer to optimise it than to run."""
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None


def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Run a jitted function: what work does that is not only recorded, see `Programs`."""
    return function(*arguments, **options)


class Programs:
    """The programs of some work, which is gone through once without being done."""

    def __init__(self):
        self._traced: dict[int, Any] = {}

    def record(self, function: Any, *arguments: Any, **options: Any) -> Any:
        """Return the shapes of a jitted function's results; arguments may be shapes, too."""
        traced = function.trace(*arguments, **options)
        self._traced.setdefault(id(traced.jaxpr), traced)  # equal ones share what they trace to
        return function.eval_shape(*arguments, **options)

    def compile(self) -> None:
        """Compile all of them in threads, for the default device; calls find them compiled."""
        start, total = time.monotonic(), len(self._traced)
        logging.info("Compiling %d programs, unless they are kept", total)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            tasks = [pool.submit(lambda t=t: t.lower().compile()) for t in self._traced.values()]
            for count, task in enumerate(concurrent.futures.as_completed(tasks), 1):
                task.result()
                if count == total or time.monotonic() - start > count:
                    seconds = time.monotonic() - start
                    logging.info("Compiled %d of %d programs in %.1f s", count, total, seconds)


def compile_once(work: Callable[..., Iterator[Any]], key: Hashable) -> None:
    """Compile the programs of `work` side by side, unless it has been done for this key.

    Args:
        work: takes `Programs.record` in the place of `call`; what it yields is of no interest.
        key: equal ones have equal programs.
    """
    if key in _COMPILED:
        return
    programs = Programs()
    for _ in work(programs.record):
        pass
    programs.compile()
    _COMPILED.add(key)


def cpu_fingerprint() -> str:
    """Name this kind of CPU: equal names have equal instructions."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else [platform.processor()]
    kept = {line for line in lines if not CPU_INFO.exists() or line.startswith(CPU_KEYS)}
    text = "\n".join([platform.machine(), *sorted(kept)])
    return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _remove_oldest(directory: pathlib.Path) -> int:
    """Delete the oldest files beyond `MAX_BYTES`; return the number of those that stay."""
    files = []
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another run does the same
            if path.is_file():
                files.append((path, path.stat()))
    files.sort(key=lambda file: file[1].st_mtime, reverse=True)
    total = number = 0
    for path, status in files:
        total += status.st_size
        if total > MAX_BYTES:
            path.unlink(missing_ok=True)
        else:
            number += 1
    return number
