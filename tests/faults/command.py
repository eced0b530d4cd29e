"""The command line in processes that have everything imported, so that killing one is cheap."""

import multiprocessing
import os
import pathlib
import pkgutil
import resource
import signal
import sys
import traceback

import jax

from dar_jax import main

ROOT = pathlib.Path(__file__).parents[2]
MODES = ("train", "sample", "cache", "evaluate")
CRASHED = 1

for mode in MODES:  # what a process forked off this one finds imported
    pkgutil.resolve_name(f"dar_jax.modes.{main.MODES[mode]}")


def server() -> multiprocessing.context.ForkServerContext:
    """A server of processes that have imported this."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def run(arguments: list[str], errors: str, programs: str, limit: int | None) -> None:
    """Run the command; does not return.

    Args:
        arguments: of the command line.
        errors: file that gets what is written to standard error.
        programs: directory of compiled programs.
        limit: bytes that a file may have.
    """
    # As in a terminal; a shell's background jobs would ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    os.chdir(ROOT)
    for path, number in ((os.devnull, 1), (errors, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", programs)
    sys.argv[:] = ["dar-jax", *arguments]
    status = 0
    try:
        main.run()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
        status = CRASHED
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
