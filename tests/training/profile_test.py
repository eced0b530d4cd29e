"""The profiler's window: which steps it records, and that it ends."""

import pathlib

import pytest

from dar_jax.training import profile
from dar_jax.training.profile import ProfileWindow

DIRECTORY = pathlib.Path("profile")


@pytest.fixture
def calls(monkeypatch):
    made = []
    monkeypatch.setattr(profile.jax.profiler, "start_trace", lambda d: made.append(("start", d)))
    monkeypatch.setattr(profile.jax.profiler, "stop_trace", lambda: made.append("stop"))
    return made


def run(window, steps, calls):
    for step in steps:
        window.before(step)
        calls.append(step)
        window.after(step, None)
    window.close()


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (range(1, 6), [1, ("start", DIRECTORY), 2, 3, "stop", 4, 5]),
        (range(3, 6), [("start", DIRECTORY), 3, "stop", 4, 5]),  # a run resumed inside the window
        (range(1, 3), [1, ("start", DIRECTORY), 2, "stop"]),  # a run that ends inside it
        (range(4, 6), [4, 5]),
    ],
)
def test_window_records_its_steps_and_ends(calls, steps, expected):
    run(ProfileWindow((2, 3), DIRECTORY), steps, calls)
    assert calls == expected


def test_no_window_records_nothing(calls):
    run(ProfileWindow((), DIRECTORY), range(1, 4), calls)
    assert calls == [1, 2, 3]
