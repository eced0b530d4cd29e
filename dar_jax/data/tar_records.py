"""Which pictures a tar has, each with what its neighbours in the tar say of its class.

The members of a record share their name up to a dot. WebDataset takes the first dot of the name:
`000.jpg`, `000.seg.png` and `000.cls` are one record. Here it is the longest name before a dot that
a label file has, so that `2021.01.05.jpg` with `2021.01.05.cls` is a record too. The picture of a
record is the one that adds nothing but a suffix to its name; others (`000.seg.png`) are masks and
further views, and are left out. Two that could be the picture are refused.

Pictures without label files have their class from their folder, and each is one of its own:
`cat/cat.0.jpg`, `cat/cat.1.jpg`, `cat/0.jpg`, `cat/0.png`. But `cat/0.jpg` beside `cat/0.seg.png`
is refused, since the second may be a mask.

A label is, in this order: the content of NAME.cls, a number or the name of a class; one of
`LABEL_KEYS` in NAME.json; the folder; the content of NAME.txt.
"""

import functools
import io
import pathlib
import posixpath
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dar_jax.common.files import parse_json
from dar_jax.common.typing import Any
from dar_jax.data.listing import Leaving, Seen
from dar_jax.data.names import NUMBER, printable
from dar_jax.data.tar_index import LABEL_SUFFIXES, Member, index_tar, open_tar

LABEL_KEYS = ("label", "cls", "class", "class_id", "class_name", "category")
"""Keys of a record's JSON that may hold its class, the first that is there being taken."""
MAX_LABEL_BYTES = 2**20
MAX_NAME = 200
"""Characters of a class's name; a longer text is a caption or something else."""
MAX_LABEL = 10**6
"""No data set has more classes; a larger number is not a label."""
MAX_DIGITS = 20


class Record(NamedTuple):
    """A picture and what is known of its class.

    Attributes:
        picture: where it is.
        label: number or name of its class; None if no `.cls` or `.json` says it.
        text: the `.txt` beside it.
        document: the `.json` beside it.
    """

    picture: Member
    label: int | str | None
    text: Member | None
    document: Member | None

    @property
    def folders(self) -> tuple[str, ...]:
        """Those in the tar that the picture is in, from outside to inside."""
        return tuple(posixpath.dirname(self.picture.name).split("/")) if "/" in self.name else ()

    @property
    def name(self) -> str:
        return self.picture.name


@functools.cache
def read_records(path: pathlib.Path) -> tuple[tuple[Record, ...], Seen]:
    """Find the pictures of a tar, in its order, and what is left out.

    Raises:
        ValueError: see `index_tar`; or two could be the picture of a record, or a label is none.
    """
    index = index_tar(path)
    leaving = Leaving()
    chosen = _choose(path, index.pictures, index.labels, leaving)
    with open_tar(path) as tar:
        records = tuple(_record(picture, stem, index.labels, tar) for picture, stem in chosen)
    return records, index.seen.without(*leaving.result())


@functools.cache
def read_texts(path: pathlib.Path) -> tuple[int | str | None, ...]:
    """Return the label in the `.txt` of every record of a tar, None where there is no such file.

    Raises:
        ValueError: one holds something else.
    """
    records, _ = read_records(path)
    with open_tar(path) as tar:
        return tuple(r.text and _checked(_content(r.text, tar).strip(), r.text) for r in records)


def _stems(name: str) -> list[str]:
    """Return the names before each dot of the last part, the longest first."""
    folder, base = posixpath.split(name)
    parts = base.split(".")
    return [posixpath.join(folder, ".".join(parts[:n])) for n in range(len(parts) - 1, 0, -1)]


def _choose(
    path: pathlib.Path,
    pictures: Sequence[Member],
    labels: Mapping[str, Member],
    leaving: Leaving,
) -> list[tuple[Member, str]]:
    """Return the picture of every record, with the name that its members share."""
    named = {posixpath.splitext(name)[0] for name in labels}
    groups: dict[str, list[Member]] = {}
    for picture in pictures:
        stems = _stems(picture.name)
        stem = next((stem for stem in stems if stem in named), stems[-1])
        groups.setdefault(stem, []).append(picture)
    chosen = []
    for stem, members in groups.items():
        whole = [m for m in members if posixpath.splitext(m.name)[0] == stem]
        if stem in named:
            candidates = whole or members
            if len(candidates) > 1:
                _refuse(path, candidates, "the picture of one record")
            for member in members:
                if member is not candidates[0]:
                    leaving.add("mask or further view of a record", member.name)
            chosen.append((candidates[0], stem))
            continue
        if whole and len(whole) < len(members):
            other = next(member for member in members if member not in whole)
            _refuse(path, [whole[0], other], "two pictures, or one and its mask")
        chosen += [(member, stem) for member in members]
    order = {member.name: number for number, member in enumerate(pictures)}
    return sorted(chosen, key=lambda pair: order[pair[0].name])


def _refuse(path: pathlib.Path, members: Sequence[Member], what: str) -> None:
    first, second = (printable(member.name) for member in members[:2])
    raise ValueError(f"{path}: {first} and {second} could be {what}; rename them, or leave one out")


def _record(
    picture: Member, stem: str, labels: Mapping[str, Member], tar: io.BufferedIOBase
) -> Record:
    number, document, text = (labels.get(stem + suffix) for suffix in LABEL_SUFFIXES)
    label = None
    if number is not None:
        label = _checked(_content(number, tar).strip(), number)
    elif document is not None:
        label = _json_label(document, tar)
    return Record(picture, label, text, document)


def _json_label(member: Member, tar: io.BufferedIOBase) -> int | str | None:
    try:
        content = parse_json(_content(member, tar))
    except ValueError as error:
        raise ValueError(f"{_where(member)} is not a JSON: {error}") from error
    if not isinstance(content, dict):
        return None
    value: Any = next((content[key] for key in LABEL_KEYS if key in content), None)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(
            f"{_where(member)} has the label {str(value)[:MAX_NAME]}, expected a number or a name"
        )
    return _checked(str(value).strip(), member)


def _checked(text: str, member: Member) -> int | str:
    if NUMBER.fullmatch(text):
        if len(text) <= MAX_DIGITS and "." not in text and 0 <= int(text) < MAX_LABEL:
            return int(text)
        shown = text if len(text) <= MAX_NAME else f"{text[:MAX_NAME]} ..."
        raise ValueError(
            f"{_where(member)} holds {shown}, no label in 0..{MAX_LABEL - 1}, a whole number"
        )
    if not text or len(text) > MAX_NAME or printable(text) != text:
        shown = repr(text if len(text) <= MAX_NAME else f"{text[:MAX_NAME]} ...")
        raise ValueError(f"{_where(member)} holds {shown}, no number and no name of a class")
    return text


def _content(member: Member, tar: io.BufferedIOBase) -> str:
    if member.size > MAX_LABEL_BYTES:
        raise ValueError(f"{_where(member)} has {member.size:,} bytes, too many for a label")
    try:
        return member.read(tar).decode("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ValueError(f"cannot read {_where(member)}: {error}") from error


def _where(member: Member) -> str:
    return printable(f"{member.path}: {member.name}")
