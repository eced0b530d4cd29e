"""The house rules that a reader relies on: imports point downwards, files stay short."""

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "dar_jax"
LEVELS = {
    room: level
    for level, rooms in enumerate(
        (
            ("common",),
            ("nn", "flow", "sampling", "parallel"),
            ("models", "losses"),
            ("data",),
            ("tasks",),
            ("training", "pipelines"),
            ("convert", "performance"),
            ("kinds",),
            ("generation",),
            ("evaluation", "caching", "serving"),
            ("demo",),
            ("config",),
            ("modes",),
            ("main", "__init__"),
            ("__main__",),
        )
    )
    for room in rooms
}
TASK_PROTOCOL = f"{PACKAGE}.tasks.base"
KNOW_ONLY_THE_PROTOCOL = ("training", "evaluation")

MAX_LINES = 400
BANNED_MODULES = re.compile(r"(^|_)(utils?|helpers?|misc|v\d+)(_|$)")
BANNED_IMPORTS = ("tensorflow", "clu.metric_writers", "clu.periodic_actions")  # need TensorFlow
PRIVATE_PATH = re.compile(r"(?<![\w.~}])/(?:home|root|Users|work|workspace|mnt|tmp)/\w")

PYTHON = sorted(
    path for folder in (PACKAGE, "configs", "tests") for path in (ROOT / folder).rglob("*.py")
)
ROOMS = {path.stem for path in (ROOT / PACKAGE).iterdir() if path.suffix in ("", ".py")}
SOURCES = [path for path in PYTHON if path.is_relative_to(ROOT / PACKAGE)]
TEXTS = [
    *PYTHON,
    *sorted(path for path in (ROOT / "launch").rglob("*") if path.is_file()),
    *sorted(path for suffix in ("md", "py", "toml") for path in ROOT.glob(f"*.{suffix}")),
    *sorted(p for folder in (PACKAGE, "configs", "tests") for p in (ROOT / folder).rglob("*.md")),
]


def relative(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: pathlib.Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it.

    `from a.b import c` gives both `a.b` and `a.b.c`, since `c` may be a module.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module: str) -> str:
    """First component below the package: `dar_jax.nn.rope` -> `nn`."""
    return module.split(".")[1]


def own_room(path: pathlib.Path) -> str:
    return path.relative_to(ROOT / PACKAGE).with_suffix("").parts[0]


def is_allowed(importer: str, imported: str) -> bool:
    return importer == imported or LEVELS[imported] < LEVELS[importer]


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_point_downwards(path):
    rooms = {room(name) for name in imports(path) if name.startswith(f"{PACKAGE}.")} & ROOMS
    wrong = sorted(other for other in rooms if not is_allowed(own_room(path), other))
    assert not wrong, f"{relative(path)} imports {', '.join(wrong)}: not below it"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_training_knows_no_concrete_task(path):
    if own_room(path) not in KNOW_ONLY_THE_PROTOCOL:
        return
    tasks = {name for name in imports(path) if name.startswith(f"{PACKAGE}.tasks.")}
    wrong = sorted(name for name in tasks if not name.startswith(TASK_PROTOCOL))
    assert not wrong, f"{relative(path)} imports {', '.join(wrong)}"


@pytest.mark.parametrize("path", PYTHON, ids=relative)
def test_heavy_frameworks_stay_out(path):
    names = set(imports(path))
    for banned in BANNED_IMPORTS:
        assert not any(f"{name}.".startswith(f"{banned}.") for name in names), banned
    if path.is_relative_to(ROOT / PACKAGE) and own_room(path) != "convert":
        assert not any(f"{name}.".startswith("torch.") for name in names)


@pytest.mark.parametrize("path", PYTHON, ids=relative)
def test_file_is_short_named_and_described(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    assert not BANNED_MODULES.search(path.stem), f"{path.stem}: name it after what it does"
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), f"{relative(path)} has no docstring"


@pytest.mark.parametrize("path", TEXTS, ids=relative)
def test_no_private_paths(path):
    found = PRIVATE_PATH.search(path.read_text())
    assert not found, f"{relative(path)} names a path of one machine: {found.group()}"


def test_every_room_has_a_level():
    rooms = {path.stem for path in SOURCES if path.parent == ROOT / PACKAGE}
    rooms |= {own_room(path) for path in SOURCES}
    assert rooms <= set(LEVELS), "a new room needs a level here and in `dar_jax/README.md`"


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("flow", "common", True),
        ("flow", "nn", False),
        ("models", "losses", False),
        ("models", "nn", True),
        ("tasks", "training", False),
        ("main", "modes", True),
        ("convert", "pipelines", True),
        ("pipelines", "convert", False),
        ("pipelines", "modes", False),
        ("evaluation", "demo", False),
    ],
)
def test_the_rule_itself(importer, imported, allowed):
    assert is_allowed(importer, imported) is allowed
