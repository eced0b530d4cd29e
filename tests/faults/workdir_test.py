"""Every file of every workdir, damaged in every way.

The command that uses it then comes to the same, or is refused in one line, or, where a person may
have edited a file, warns. `TABLE` in the environment names a file that gets every outcome.
"""

import os
import shutil

import pytest

from tests.faults import damages
from tests.faults.cheap import cheap_parts
from tests.faults.places import PLACES

QUICK = 6
"""Outcomes of each place in the default tests."""
SLOW = [name for name in PLACES if name.startswith("run of")]
"""Places whose command takes seconds."""
TABLE = os.environ.get("TABLE")


@pytest.fixture(autouse=True)
def parts():
    with cheap_parts():
        yield


def everything(place, root):
    """Path, name and function of all that is done to a prepared place."""
    for used in (*place.used, *place.given):
        base = root / used
        paths = [base] if base.is_file() else sorted([base, *base.rglob("*")])
        for path in filter(os.path.exists, paths):
            for how, damage in damages.damages_of(path):
                if used in place.used or how in damages.IN_PLACE:
                    yield path.relative_to(root), how, damage


def outcomes(place, tmp_path, chosen):
    """Damage, run the command, and yield what came of it, where `chosen` says."""
    root, kept = tmp_path / "place", tmp_path / "kept"
    root.mkdir()
    place.prepare(root)
    shutil.copytree(root, kept)
    expected, usual = damages.undisturbed(lambda: place.run(root))
    for path, how, damage in chosen([*everything(place, kept)]):
        shutil.rmtree(root)
        shutil.copytree(kept, root)
        damage(root / path)
        yield path, how, *damages.outcome(lambda: place.run(root), expected, usual)


def check(name, tmp_path, chosen):
    wrong = []
    for path, how, verdict, text in outcomes(PLACES[name], tmp_path, chosen):
        if TABLE:
            with open(TABLE, "a") as file:
                file.write(f"{name}\t{path}\t{how}\t{verdict}\t{text}\n")
        if verdict in damages.WRONG:
            wrong.append(f"{path} {how}: {verdict}: {text}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", [name for name in PLACES if name not in SLOW])
def test_some_damages_of_every_place(name, tmp_path):
    """Others in each place."""
    first = list(PLACES).index(name)
    check(name, tmp_path, lambda every: every[first :: max(1, len(every) // QUICK)])


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACES)
def test_every_damage_of_every_file(name, tmp_path):
    check(name, tmp_path, lambda every: every)
