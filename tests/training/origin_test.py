"""What a run is made from: what may change, what is refused, what is recorded."""

import json
import subprocess
import sys

import pytest

from dar_jax.parallel.workdir import exclusive, open_workdir
from dar_jax.training import origin
from tests.damage import warnings

A, B = "a" * 64, "b" * 64
MADE = {
    "tokenizer": A,
    "classes": ["cat", "dog"],
    "data": {"pictures": 9, "names": A, "contents": A, "times": A},
    "files": {"loss.reward": A},
}
BOUND = {
    "task": "dar_prior",
    "seed": 0,
    "tokenizer": "one/model",
    "model": {"dim": 8},
    "loss": {"reward": "one.py"},
    "data": {"batch_size": 4, "flip": True},
    "optimizer": {"learning_rate": 1e-3, "decay_end": 0, "name": "adamw", "ema_decay": 0.9},
    "made_from": MADE,
}


def changed(**made):
    return {**BOUND, "made_from": {**MADE, **made}}


def data(**values):
    return changed(data={**MADE["data"], **values})


CHANGES = {
    "tokenizer": (changed(tokenizer=B), "another tokenizer (aaaaaaaaaaaa, now bbbbbbbbbbbb)"),
    "classes": (changed(classes=["cat", "emu"]), "label 1 was 'dog' and is 'emu'"),
    "data": (data(pictures=10), "another number of pictures (9, now 10)"),
    "data.names": (data(names=B, contents=B), "another list of names, sizes and labels"),
    "data.contents": (data(contents=B), "another content of pictures"),
    "optimizer.learning_rate": (
        {**BOUND, "optimizer": {**BOUND["optimizer"], "learning_rate": 1e-4}},
        "optimizer.learning_rate=0.001, the config has 0.0001",
    ),
    "optimizer.decay_end": (
        {**BOUND, "optimizer": {**BOUND["optimizer"], "decay_end": 9}},
        "optimizer.decay_end=0, the config has 9",
    ),
    "data.batch_size": (
        {**BOUND, "data": {"batch_size": 8, "flip": True}},
        "data.batch_size=4, the config has 8",
    ),
    "data.flip": ({**BOUND, "data": {"batch_size": 4, "flip": False}}, "data.flip=True"),
}


def check(wanted, *allowed):
    changes = origin.find_changes(BOUND, wanted, {})
    origin.check_allowed(changes, allowed, "DIR")
    return changes


@pytest.mark.parametrize("name", CHANGES)
def test_change_is_refused_unless_it_is_allowed(name, caplog):
    wanted, text = CHANGES[name]
    key = "data" if name in ("data.names", "data.contents") else name
    with pytest.raises(ValueError, match="^DIR holds a checkpoint with ") as caught:
        check(wanted)
    assert text in str(caught.value) and "\n" not in str(caught.value)
    assert f"--config.train.allow_change={key}" in str(caught.value)
    with warnings(caplog) as told:
        assert check(wanted, key)
    assert any(text in line for line in told)
    origin.check_keys([key], BOUND)


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ({**BOUND, "model": {"dim": 16}}, "model.dim=8"),
        ({**BOUND, "seed": 1}, "seed=0"),
        (changed(files={"loss.reward": B}), "another loss.reward (aaaaaaaaaaaa, now bbbb"),
        (changed(classes=["cat"]), "2 classes, where the data have 1"),
        ({**BOUND, "optimizer": {**BOUND["optimizer"], "name": "muon"}}, "optimizer.name="),
        ({**BOUND, "optimizer": {**BOUND["optimizer"], "ema_decay": 0.0}}, "optimizer.ema_decay="),
    ],
)
def test_what_leaves_no_way_to_go_on_cannot_be_allowed(wanted, text):
    with pytest.raises(ValueError, match="holds a checkpoint") as caught:
        check(wanted, "model", "seed", "classes", "optimizer", "data")
    assert text in str(caught.value) and "allow_change" not in str(caught.value)


def test_model_or_file_may_lie_elsewhere():
    moved = {"tokenizer": "moved/model", "loss": {"reward": "moved.py"}}
    assert check({**BOUND, **moved}) == {}


def test_file_and_model_directory_are_known_by_their_contents(tmp_path):
    reward, copy = tmp_path / "reward.py", tmp_path / "copy.py"
    reward.write_text("1")
    copy.write_text("1")
    shipped = origin.content_of("package://mnist/tokenizer")
    assert origin.content_of(str(reward)) == origin.content_of(str(copy)) != shipped
    copy.write_text("2")
    assert origin.content_of(str(reward)) != origin.content_of(str(copy))


def test_new_times_of_files_are_told_and_no_more(caplog):
    with warnings(caplog) as told:
        assert check(data(times=B)) == {"data.times": (A, B)}
    assert len(told) == 1 and "other times" in told[0]


def test_checkpoint_without_fingerprints_goes_on_with_a_word(caplog):
    old = {name: value for name, value in BOUND.items() if name != "made_from"}
    with warnings(caplog) as told:
        assert origin.find_changes(old, BOUND, {}) == {}
    assert "does not say" in told[0]
    assert origin.find_changes(old, {**BOUND, "tokenizer": "other"}, {}).keys() == {"tokenizer"}


@pytest.mark.parametrize(
    ("key", "near"),
    [("optimizer.lerning_rate", "optimizer.learning_rate"), ("model.dim", ""), ("tokeniser", "")],
)
def test_unknown_keys_to_change_are_one_line(key, near):
    with pytest.raises(ValueError, match=f"names '{key}'") as caught:
        origin.check_keys(["data", key], BOUND)
    assert near in str(caught.value) and "\n" not in str(caught.value)


def test_history_grows_by_a_line_for_every_change(tmp_path):
    origin.record(tmp_path, 3, {})
    assert not (tmp_path / "history.jsonl").exists()
    origin.record(tmp_path, 3, {"tokenizer": (A, B)})
    origin.record(tmp_path, 5, {"data.flip": (True, False)})
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 5]
    assert lines[0]["changes"] == {"tokenizer": [A, B]}


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("4711 on host")
file.flush()
print("held", flush=True)
sys.stdin.read()
"""


def test_workdir_that_is_no_utf8_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"workdir '.*x\\udcff' is no UTF-8; choose another"):
        open_workdir(f"{tmp_path}/x\udcff")


def test_second_run_in_a_workdir_is_refused_until_the_first_is_gone(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another run is at work in .*4711 on host"):
            exclusive(tmp_path).__enter__()
        holder.kill()
    with exclusive(tmp_path):
        assert (tmp_path / ".lock").exists()
    assert list(tmp_path.iterdir()) == []
