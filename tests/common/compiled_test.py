"""Where compiled programs are kept, and that the next run finds them there."""

import os
import subprocess
import sys

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
