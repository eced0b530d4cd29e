"""Captions of pictures: several, one or none each.

For a folder they stand in a table at its top, `captions.jsonl`, `captions.csv`, `metadata.jsonl` or
`metadata.csv`, a row per caption or picture with a path from there and a text; or, without one, in
`NAME.txt`, a caption per line, or `NAME.json` beside `NAME.jpg`. In tars they stand in the `.txt`
or `.json` of a record. JSON is a text, a list of texts, or an object with one of `TEXT_KEYS`. The
same may stand in a column of TensorFlow Datasets which one of `TEXT_KEYS` names; every record is
read once for it. Emoji have names.

Pictures without a caption are left out, and counted.
"""

import csv
import dataclasses
import io
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from absl import logging

from dar_jax.common.files import parse_json, read_regular
from dar_jax.common.typing import Any
from dar_jax.data import folder, tar
from dar_jax.data.base import Source
from dar_jax.data.embedded import ArraySource
from dar_jax.data.folder import FolderSource
from dar_jax.data.names import printable
from dar_jax.data.tar import TarSource
from dar_jax.data.tar_index import Member, open_tar
from dar_jax.data.tfds import TfdsSource

TABLES = ("captions.jsonl", "captions.csv", "metadata.jsonl", "metadata.csv")
PATH_KEYS = ("file_name", "file", "path", "image")
TEXT_KEYS = ("captions", "caption", "text", "prompt")
"""Of which the first that is there is taken."""
MAX_TABLE_BYTES = 2**32
MAX_BYTES = 2**20
"""Of the captions of one picture."""
SHOWN = 3
"""Pictures without a caption that are named."""

Captions = tuple[str, ...]


def with_captions(source: Source) -> Source:
    """Return the pictures that have captions, with these.

    Raises:
        ValueError: none has, a caption is no text, or the source is of another kind.
    """
    if isinstance(source, FolderSource):
        captions = _of_folder(source)
    elif isinstance(source, TarSource):
        captions = _of_tars(source.texts)
    elif isinstance(source, TfdsSource):
        captions = _of_records(source)
    elif isinstance(source, ArraySource) and source.captions:
        return source
    else:
        raise ValueError(
            "data.captions=True needs data.source=folder, tar, tfds:NAME or emoji, which may have "
            "captions"
        )
    kept = [index for index, texts in enumerate(captions) if texts]
    lacking = [index for index, texts in enumerate(captions) if not texts]
    if not kept:
        raise ValueError(
            f"none of {len(source):,} pictures such as {source.name(0)} has a caption; expected "
            f"NAME.txt or NAME.json beside it, or for a folder {' or '.join(TABLES[:2])}"
        )
    if lacking:
        logging.warning(
            "Left out %d of %d pictures, whose captions are missing or empty: %s%s",
            len(lacking),
            len(source),
            ", ".join(source.name(index) for index in lacking[:SHOWN]),
            ", ..." if len(lacking) > SHOWN else "",
        )
    captions = tuple(captions[index] for index in kept)
    if isinstance(source, TfdsSource):
        return dataclasses.replace(source, indices=tuple(kept), captions=captions)
    if isinstance(source, TarSource):
        return dataclasses.replace(tar.select(source, kept), captions=captions)
    return dataclasses.replace(folder.select(source, kept), captions=captions)


def read_captions(data: bytes, suffix: str, where: str) -> Captions:
    """Read the captions of one picture.

    Args:
        data: of the file.
        suffix: ".txt" or ".json".
        where: the file, for messages.

    Raises:
        ValueError: it is no text, or JSON without one.
    """
    text = _decoded(data, where)
    if suffix == ".txt":
        return _cleaned(text.split("\n"))
    try:
        return _of_json(parse_json(text), where)
    except ValueError as error:
        raise ValueError(f"cannot read captions: {where}: {error}") from error


def read_table(path: pathlib.Path) -> dict[str, Captions]:
    """Read the captions of a folder, by the path of the picture from there.

    Raises:
        ValueError: it cannot be read, or a row has no path or no text.
    """
    try:
        text = _decoded(read_regular(path, MAX_TABLE_BYTES), str(path))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    found: dict[str, Captions] = {}
    rows = _json_rows if path.suffix == ".jsonl" else _csv_rows
    for number, row in rows(text, path):
        where = f"{path}: line {number}"
        name = next((row[key] for key in PATH_KEYS if isinstance(row.get(key), str)), None)
        if name is None:
            raise ValueError(f"{where} has none of {', '.join(PATH_KEYS)}, the picture's path")
        name = os.path.normpath(name)
        found[name] = found.get(name, ()) + _of_json(row, where)
    return found


def _json_rows(text: str, path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {number} is no object with a path and a text")
        yield number, row


def _csv_rows(text: str, path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            if any(row.get(None) or ()):  # empty fields at the end are a spreadsheet's
                raise ValueError(
                    f"{path}: line {reader.line_num} has more fields than the first line: put a "
                    'text that has commas in "quotes"'
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: {error}") from error


def _of_folder(source: FolderSource) -> list[Captions]:
    table = next((source.root / name for name in TABLES if (source.root / name).is_file()), None)
    if table is None:
        return [_beside(source.root / path) for path in source.paths]
    found = read_table(table)
    return [found.get(os.path.normpath(path), ()) for path in source.paths]


def _beside(picture: pathlib.Path) -> Captions:
    stem = os.path.splitext(picture)[0]
    for suffix in (".txt", ".json"):
        path = f"{stem}{suffix}"
        try:
            data = read_regular(path, MAX_BYTES)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ValueError(f"cannot read {printable(path)}: {error.strerror or error}") from error
        return read_captions(data, suffix, printable(path))
    return ()


def _of_tars(texts: Sequence[Member | None]) -> list[Captions]:
    found: list[Captions] = [()] * len(texts)
    members = [(member.path, index, member) for index, member in enumerate(texts) if member]
    for path, group in itertools.groupby(sorted(members), key=lambda item: item[0]):
        with open_tar(path) as file:
            for _, index, member in group:
                found[index] = _of_member(member, file)
    return found


def _of_records(source: TfdsSource) -> list[Captions]:
    columns = source.record(0) if len(source) else TEXT_KEYS
    key = next((key for key in TEXT_KEYS if key in columns), None)
    if key is None:
        raise ValueError(
            f"{source.name(0)} has none of {', '.join(TEXT_KEYS)}; it has {', '.join(columns)}"
        )
    return [
        _of_json(_as_json(source.record(index)[key], source.name(index)), source.name(index))
        for index in range(len(source))
    ]


def _as_json(value: Any, where: str) -> Any:
    """Make texts and lists of what TFDS has as bytes and arrays."""
    if isinstance(value, bytes):
        return _decoded(value, where)
    if isinstance(value, dict):
        return {key: _as_json(item, where) for key, item in value.items()}
    return [_as_json(item, where) for item in value] if np.ndim(value) else value


def _of_member(member: Member, file: io.BufferedIOBase) -> Captions:
    where = printable(f"{member.path}: {member.name}")
    if member.size > MAX_BYTES:
        raise ValueError(f"{where} has {member.size:,} bytes, too many for captions")
    try:
        data = member.read(file)
    except OSError as error:
        raise ValueError(f"cannot read {where}: {error}") from error
    return read_captions(data, os.path.splitext(member.name)[1].lower(), where)


def _decoded(data: bytes, where: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is no text in UTF-8 from byte {error.start} on") from error
    if "\0" in text:
        raise ValueError(f"{where} is no text: it has a zero byte")
    return text


def _of_json(content: Any, where: str) -> Captions:
    """The captions in a text, a list of texts, or an object that has one of them."""
    if isinstance(content, dict):
        key = next((key for key in TEXT_KEYS if key in content), None)
        if key is None:
            raise ValueError(f"{where} has none of {', '.join(TEXT_KEYS)}")
        content = content[key]
    texts = content if isinstance(content, list) else [content]
    wrong = next((text for text in texts if not isinstance(text, str | None)), None)
    if wrong is not None:
        raise ValueError(f"{where} has {printable(repr(wrong)[:40])} where a caption should be")
    return _cleaned(text for text in texts if text)


def _cleaned(texts: Iterable[str]) -> Captions:
    return tuple(text for text in map(str.strip, texts) if text)
