"""The texts of errors: one line that says what is wrong, with a value or what would be right."""

import ast

import pytest

from tests.architecture_test import SOURCES, relative

REMEDIES = (";", ": ", "use ", "needs ", "need ", "must ", "expected ", "choose ", "pass ", "run ")
"""What a text without a value has one of: it says what to do, or what would be right."""
MAX_LENGTH = 400
WRAPPED = (
    "it is nested too deep",
    "floating-point pixels have no range",
    "the record has no label",
)
"""Texts that whoever catches them puts the name of a file before."""


def messages(path):
    """(line, constant text, has a value) of every ValueError that a file raises."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
            continue
        name = node.exc.func
        if not (isinstance(name, ast.Name) and name.id.endswith("Error") and node.exc.args):
            continue
        said = node.exc.args[name.id == "ApiError"]  # whose first argument is a status
        text = [n.value for n in ast.walk(said) if isinstance(n, ast.Constant)]
        parts = [part for part in text if isinstance(part, str)]
        has_value = any(isinstance(n, ast.FormattedValue | ast.Name) for n in ast.walk(node.exc))
        yield (
            node.lineno,
            "".join(parts),
            has_value and not isinstance(said, ast.Constant),
        )


COLLECTED = [(relative(path), *message) for path in SOURCES for message in messages(path)]


def test_messages_are_found():
    assert len(COLLECTED) > 200


@pytest.mark.parametrize("rule", ["one line", "short", "value or remedy"])
def test_messages_follow_the_rules(rule):
    wrong = []
    for path, line, text, has_value in COLLECTED:
        kept = {
            "one line": "\n" not in text,
            "short": len(text) <= MAX_LENGTH,
            "value or remedy": has_value or any(part in text for part in (*REMEDIES, *WRAPPED)),
        }[rule]
        if not kept:
            wrong.append(f"{path}:{line}: {text}")
    assert not wrong, "\n".join(wrong)
