"""The READMEs: short, with links and files that exist, and commands that any shell understands."""

import functools
import importlib
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.architecture_test import LEVELS, ROOT

TOP = ROOT / "README.md"
FOLDERS = ("configs", "launch", "dar_jax", "tests")
READMES = [TOP, *sorted(path for name in FOLDERS for path in (ROOT / name).rglob("README.md"))]
ROOMS = [
    ROOT / room / "README.md"
    for room in ("configs", "launch", "dar_jax", "dar_jax/evaluation", "dar_jax/performance")
]
ARCHITECTURE = ROOT / "dar_jax/README.md"
GOLDEN = ROOT / "tests/golden"
WALKS = ("One training step", "One generation", "One request", "One evaluation")
MAX_FILES_OF_WALK = 7
MAX_LINES = 130
LANGUAGES = ("bash", "python", "bibtex", "text")

FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FIGURE = re.compile(r"\d[\d,.]*")
PATH = re.compile(r"(?<![\w./-])(?:configs|launch|dar_jax|tests)/[\w./*-]*")
FILE_OF_DATA = re.compile(r"(?<![\w./*])[\w./*]+\.(?:npz|json|safetensors|py)")
PLACEHOLDER = "NAME"
HERE_DOCUMENT = re.compile(r" <<'END'\n.*?^END$", re.MULTILINE | re.DOTALL)
PROGRAMS = ("bash", "curl", "dar-jax", "docker", "git", "pip", "python", "ray", "sbatch")
BUILTINS = ("cd", "export")
RECORDER = """#!/bin/sh
{ printf '%s\\t' "${0##*/}" "$@"; echo; } >> "$LOG"
"""
"""A program that notes how it was called."""
NO_START_FILES = {"bash": ["--norc", "--noprofile"], "zsh": ["-f"]}
VARIABLE_COMMAND = re.compile(r"^\s*\$\w+ ", re.MULTILINE)
COMMENT_BEHIND = re.compile(r"^\s*[^#\s].*\s#", re.MULTILINE)


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def prose(text):
    """The text without its fenced blocks."""
    return FENCE.sub("", text)


def cells(text):
    """Every cell of every table, without the lines under the headings."""
    for line in prose(text).splitlines():
        if line.startswith("|") and not re.fullmatch(r"[|\s:-]+", line):
            yield from (cell.strip() for cell in line.strip("|").split("|"))


def figures(cell):
    """The numbers of a cell, other than in code and addresses."""
    return FIGURE.findall(LINK.sub("]", CODE.sub("", cell)))


def shell_blocks():
    return [
        pytest.param(block, id=f"{name_of(path)}-{number}")
        for path in READMES
        for number, (language, block) in enumerate(FENCE.findall(path.read_text()), start=1)
        if language == "bash"
    ]


def commands():
    """The words of every command that names a config."""
    blocks = [block for param in shell_blocks() for block in param.values]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line) for line in lines if "--config=" in line]


def value_of(words, flag):
    """The value of a flag that is given at most once; None if it is not given."""
    values = [word.removeprefix(f"{flag}=") for word in words if word.startswith(f"{flag}=")]
    assert len(values) < 2, f"{flag} is given twice"
    return values[0] if values else None


def missing_links(path, text):
    found = [link.partition("#")[0] for link in LINK.findall(prose(text)) if "://" not in link]
    return [link for link in found if link and not (path.parent / link).exists()]


def missing_files(path, text):
    """Files that code or commands name and that do not exist; golden data have them beside it."""
    of_data = path.is_relative_to(GOLDEN)
    code = [*CODE.findall(prose(text)), *(block for _, block in FENCE.findall(text))]
    found = [name for part in code for name in (FILE_OF_DATA if of_data else PATH).findall(part)]
    places = (ROOT, path.parent, *path.parent.glob("*/")) if of_data else (ROOT,)
    return [
        name
        for name in found
        if PLACEHOLDER not in name and not any(list(place.glob(name)) for place in places)
    ]


def shell_faults(block):
    """What keeps a block from running alike in bash and zsh."""
    if VARIABLE_COMMAND.search(block):
        yield "a command in a variable: zsh does not split it"
    if COMMENT_BEHIND.search(block):
        yield "a comment behind a command: zsh takes it for arguments"


def test_the_rooms_have_readmes():
    assert set(ROOMS) <= set(READMES)
    assert shell_blocks()


def test_top_readme_is_short():
    assert len(TOP.read_text().splitlines()) <= MAX_LINES


def test_top_readme_leads_to_every_room():
    links = {(ROOT / link).resolve() for link in LINK.findall(TOP.read_text())}
    assert {path.resolve() for path in ROOMS} <= links


def test_no_cell_of_the_top_readme_has_two_figures():
    crowded = [cell for cell in cells(TOP.read_text()) if len(figures(cell)) > 1]
    assert not crowded, crowded


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_links_and_files_exist(path):
    text = path.read_text()
    assert not missing_links(path, text)
    assert not missing_files(path, text)


@pytest.mark.parametrize("path", [TOP, *ROOMS], ids=name_of)
def test_fences_say_their_language(path):
    languages = [language for language, _ in FENCE.findall(path.read_text())]
    assert set(languages) <= set(LANGUAGES)


def written(block, folder):
    """The words of every program that a block starts in a folder, as a reader sees them."""
    text = HERE_DOCUMENT.sub("\n", block).replace("\\\n", "").replace("$PWD", str(folder))
    lines = [shlex.split(line) for line in re.split(r"\n|&&", text)]
    return [
        [words[0].rpartition("/")[2], *words[1:]]
        for words in lines
        if words and words[0] not in BUILTINS
    ]


@pytest.fixture(params=["bash", "zsh"])
def typed(request, tmp_path):
    """Types a block into a shell at the top of a checkout; returns the words of what it starts."""
    shell = shutil.which(request.param)
    if shell is None:
        pytest.skip(f"{request.param} is not installed")
    log = tmp_path / "log"
    for name in (*(f"bin/{name}" for name in PROGRAMS), "dar_jax/.venv/bin/python"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(RECORDER)
        (tmp_path / name).chmod(0o755)

    def typed(block):
        command = [shell, *NO_START_FILES[request.param], "-i", "-e"]
        environment = {"PATH": f"{tmp_path}/bin", "LOG": str(log), "HOME": str(tmp_path)}
        options = dict(env=environment, capture_output=True, text=True, check=False)
        cwd = tmp_path if "git clone" in block else tmp_path / "dar_jax"
        done = subprocess.run(command, input=block, cwd=cwd, **options)
        assert done.returncode == 0, done.stderr
        return [line.split("\t")[:-1] for line in log.read_text().splitlines()]

    return typed


@pytest.mark.parametrize("block", shell_blocks())
def test_block_does_in_a_shell_what_is_written(block, typed, tmp_path):
    assert typed(block) == written(block, tmp_path / "dar_jax")


@pytest.mark.parametrize("block", shell_blocks())
def test_commands_are_for_any_shell(block, tmp_path):
    assert not list(shell_faults(block))
    script = tmp_path / "block.sh"
    script.write_text(f"#!/bin/bash -e\n{block}")
    check = [str(pathlib.Path(sys.executable).parent / "shellcheck"), str(script)]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_levels_are_those_that_imports_obey():
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", ARCHITECTURE.read_text(), re.MULTILINE)
    documented = {room: int(level) for level, rooms in rows for room in CODE.findall(rooms)}
    assert documented == LEVELS


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_name_configs_modes_and_keys_that_exist(words):
    path, _, variant = value_of(words, "--config").partition(":")
    name = path.removesuffix(".py").removeprefix("configs/")
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config(*([variant] if variant else []))
    for word in words:
        if word.startswith("--config."):
            *blocks, key = word.partition("=")[0].split(".")[1:]
            block = functools.reduce(lambda found, name: found[name], blocks, config)
            assert key in block, word
    assert value_of(words, "--workdir")
    mode = value_of(words, "--mode") or "train"
    assert (ROOT / f"dar_jax/modes/{mode}.py").exists(), mode


@pytest.mark.parametrize("walk", WALKS)
def test_a_walk_is_one_paragraph_of_few_files(walk):
    (paragraph,) = re.findall(rf"^\*\*{walk}\.\*\*.*?\n\n", ARCHITECTURE.read_text(), re.M | re.S)
    files = {code for code in CODE.findall(paragraph) if code.endswith(".py")}
    assert 1 < len(files) <= MAX_FILES_OF_WALK


@pytest.mark.parametrize(
    ("cell", "count"),
    [
        ("2.44", 1),
        ("1,024", 1),
        ("88.1 92.4 %", 2),
        ("2.1 GB; 1.4 GB", 2),
        ("`--config.mesh.fsdp=8` and `--config.x=4`", 0),
        ("[D-AR](https://arxiv.org/abs/2505.23660)", 0),
    ],
)
def test_figures_of_a_cell(cell, count):
    assert len(figures(cell)) == count


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("`dar_jax/main.py` and `configs/mnist.py:{dar,kl_vae}`", []),
        ("`dar_jax/nowhere.py`", ["dar_jax/nowhere.py"]),
        ("`dar_jax/modes/NAME.py`, `config.json`", []),
        ("```bash\npython --config=configs/nowhere.py:b\n```\n", ["configs/nowhere.py"]),
        ("`docker run --volume=/dar_jax/runs`", []),
    ],
)
def test_missing_files_of_the_top_readme(text, missing):
    assert missing_files(TOP, text) == missing


def test_missing_file_beside_golden_data_and_missing_link_are_found():
    golden = GOLDEN / "dar/lpips/README.md"
    assert missing_files(golden, "`weights.json`") == []
    assert missing_files(golden, "`state_dict.safetensors`") == ["state_dict.safetensors"]
    assert missing_links(golden, "[up](../README.md), [gone](gone.md#there)") == ["gone.md"]


@pytest.mark.parametrize(
    ("block", "count"),
    [
        ("python -m dar_jax.main --config.sample.labels=3,5\n", 0),
        ('run="python -m dar_jax.main"\n$run --mode=sample\n', 1),
        ("bash launch/test.sh    # installs\n", 1),
    ],
)
def test_faults_of_a_shell_block(block, count):
    assert len(list(shell_faults(block))) == count
