"""Where compiled programs are kept, and that the next run finds them there."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.common import compiled

PROGRAM = """
import sys
import jax
from dar_jax.common import compiled

compiled.keep_programs(sys.argv[1])
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
print(jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((4, 4)))[0, 0])
print(sum(event.endswith("cache_hits") for event in hits) > 0)
"""


def run(setting, **environment):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, setting],
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "true", **environment},
        capture_output=True,
        text=True,
    )


def found(setting, **environment):
    """Compile something; tell whether an earlier run has."""
    value, hit = run(setting, **environment).stdout.split()
    assert value == "5.0"
    return hit == "True"


def test_next_run_finds_what_is_kept(tmp_path):
    named, user = tmp_path / "named", tmp_path / "user"
    assert [found(str(named)), found(str(named))] == [False, True]
    assert [path.name for path in named.iterdir()] == [compiled.cpu_fingerprint()]
    environment = {"XDG_CACHE_HOME": str(user)}
    assert [found("", **environment), found("", **environment)] == [False, True]
    assert (user / compiled.FOLDER / compiled.cpu_fingerprint()).is_dir()
    assert not found(compiled.OFF, **environment)
    assert not found("", **environment, JAX_ENABLE_COMPILATION_CACHE="false")


def test_cpus_of_other_instructions_have_folders_of_their_own(tmp_path, monkeypatch):
    names = []
    for number, text in enumerate(
        ["flags : avx2\nMHz : 1\n", "flags : avx2\nMHz : 2\n", "flags : avx2 avx512f\n"]
    ):
        path = tmp_path / str(number)
        path.write_text(text)
        monkeypatch.setattr(compiled, "CPU_INFO", path)
        names.append(compiled.cpu_fingerprint())
    assert names[0] == names[1] != names[2]


def test_oldest_programs_go_first(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "MAX_BYTES", 10)
    for number in range(4):
        path = tmp_path / str(number)
        path.write_bytes(bytes(4))
        os.utime(path, (number, number))
    assert compiled._remove_oldest(tmp_path) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"2", "3"}


def test_directory_that_cannot_be_used_is_refused_if_it_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    error = run(str(tmp_path / "file")).stderr.splitlines()[-1]
    assert error.startswith("ValueError: config.compute.cache=")
    assert error.endswith("name another directory, or off")
    assert not found("", XDG_CACHE_HOME=str(tmp_path / "file"))


@pytest.fixture
def compilations():
    """Seconds of every compilation so far."""
    seconds = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seconds
    jax.monitoring.unregister_event_duration_listener(listen)


def test_calls_find_what_was_compiled_side_by_side(compilations):
    grow = jax.jit(lambda x, n: jnp.pad(x, (0, n)), static_argnums=1)
    double = jax.jit(lambda x: 2 * x)

    def work(x, run):
        for _ in range(2):
            x = run(double, run(grow, x, 1))
            yield x

    x = np.ones(3, np.float32)
    for _ in range(2):
        compiled.compile_once(functools.partial(work, x), "growing")
    assert len(compilations) == 4  # neither function has the same shape twice
    *_, result = work(x, compiled.call)
    np.testing.assert_array_equal(result, [4, 4, 4, 0, 0])
    assert len(compilations) == 4
