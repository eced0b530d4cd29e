"""Signals, as a process without JAX meets them: what is begun is cleared away, one line is said."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest

from dar_jax.common import interrupts

ROOT = pathlib.Path(__file__).parents[2]
TIMEOUT_S = 60
PROGRAM = """
import hashlib, sys, threading, time
from dar_jax.common import files, interrupts

def main():
    interrupts.install()
    with files.replacing(sys.argv[1] + "/result") as path:
        path.touch()
        print("ready", flush=True)
        {action}

try:
    main()
except interrupts.Interrupted as stop:
    interrupts.leave(f"stopped by {{stop}}", stop.status)
except OSError as error:
    interrupts.leave(f"failed: {{error}}", 2)
"""
WAIT = "time.sleep(60)"
COMPILE = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
"""Like a compilation: Python sees no signal before it is over."""
FAIL = """
        def write():
            raise OSError(28, "No space left on device")
        threading.Thread(target=write).start()
        time.sleep(60)
"""
DROP = """
        class Drops:
            def __del__(self):
                time.sleep(60)
        Drops()
        time.sleep(60)
"""
"""What the signal raises, it raises where nothing can be raised."""
EARLY = """
import os, signal, threading
threading.Thread.start = lambda thread: os.kill(os.getpid(), signal.SIGTERM)
"""
NOISE = """
        class Closed:
            def __del__(self):
                raise RuntimeError("Event loop is closed")
        Closed()
        interrupts.silence()
        def fail():
            raise KeyError
        for target in (fail, Closed):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
        raise OSError("what ended it")
"""
"""An error ends a loop of callbacks, then the run; threads go on for a while."""


def start(folder, action, ignored=None):
    def prepare():
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number == ignored else signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(action=action), str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def end(process):
    _, error = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, error.splitlines()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_with_one_line_and_leaves_nothing(tmp_path, number):
    process = start(tmp_path, WAIT)
    process.send_signal(number)
    assert end(process) == (128 + number, [f"stopped by {number.name}"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_that_a_callback_drops_is_raised_again(tmp_path, number):
    process = start(tmp_path, DROP)
    time.sleep(0.5)
    process.send_signal(number)
    assert end(process) == (128 + number, [f"stopped by {number.name}"])
    assert list(tmp_path.iterdir()) == []


def test_signal_that_comes_before_all_is_installed_is_one_line(tmp_path):
    program = EARLY + PROGRAM.format(action=WAIT)
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stderr) == (143, "stopped by SIGTERM\n")


def test_second_ctrl_c_ends_what_holds_python_up(tmp_path):
    process = start(tmp_path, COMPILE)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert end(process) == (130, ["dar_jax: stopped at once; what was saved is whole"])


def test_hangup_that_nohup_ignores_stays_ignored(tmp_path):
    process = start(tmp_path, WAIT, ignored=signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert end(process) == (143, ["stopped by SIGTERM"])


def test_signal_of_a_failure_that_is_none_is_passed_over(tmp_path):
    process = start(tmp_path, WAIT)
    process.send_signal(interrupts.FAILURE)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert end(process) == (143, ["stopped by SIGTERM"])


def test_thread_that_cannot_write_ends_the_process_with_one_line(tmp_path):
    why = f"failed: [Errno 28] No space left on device: '{tmp_path / 'result'}'"
    assert end(start(tmp_path, FAIL)) == (2, [why])
    assert list(tmp_path.iterdir()) == []


def test_what_threads_say_after_the_error_that_ends_a_run_is_dropped(tmp_path):
    assert end(start(tmp_path, NOISE)) == (2, ["failed: what ended it"])
