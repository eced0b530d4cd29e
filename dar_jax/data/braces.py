"""Names by braces, as shells expand them and WebDataset takes them: `a-{00..14}.tar`, `{a,b}/c`."""

import itertools
import re
from collections.abc import Iterator

MAX_NAMES = 100_000
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand(pattern: str) -> list[str]:
    """Return the names that a pattern stands for, in its order.

    Raises:
        ValueError: a brace is not closed or holds neither a range nor a list, or the names are too
            many.
    """
    names = list(itertools.islice(_expand(pattern, pattern), MAX_NAMES + 1))
    if len(names) > MAX_NAMES:
        raise ValueError(f"{pattern!r} stands for more than {MAX_NAMES:,} names")
    return names


def _expand(text: str, pattern: str) -> Iterator[str]:
    match = BRACES.search(text)
    if match is None:
        if "{" in text or "}" in text:
            raise ValueError(f"{pattern!r} has a brace without the other one")
        yield text
        return
    for choice in _choices(match[1], pattern):
        yield from _expand(text[: match.start()] + choice + text[match.end() :], pattern)


def _choices(inside: str, pattern: str) -> Iterator[str]:
    if match := RANGE.fullmatch(inside):
        first, last = map(int, match.groups())
        if first > last:
            raise ValueError(f"the range {{{inside}}} of {pattern!r} is empty")
        # As shells do: zeros before one of the numbers are kept.
        padded = any(number.startswith("0") and len(number) > 1 for number in match.groups())
        width = max(map(len, match.groups())) if padded else 0
        return (f"{number:0{width}d}" for number in range(first, last + 1))
    if "," not in inside:
        raise ValueError(
            f"{{{inside}}} of {pattern!r} is not a range {{000..146}} and no list {{a,b}}"
        )
    return iter(inside.split(","))
