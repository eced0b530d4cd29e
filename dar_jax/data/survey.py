"""What a run is about to train on, checked and counted before its first step.

The held-out part is opened, and the headers of its pictures are read: all of them, or the first
`MAX_HEADERS` in its order, which is one by chance. So a part that lacks, is empty or cannot be read
ends a run at its start, not when the first pictures are shown. Nothing is decoded.
"""

import functools
import itertools
import operator
import pathlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from absl import logging

from dar_jax.common import storage
from dar_jax.data import mirror
from dar_jax.data.base import DataConfig, EncodedSource, Source
from dar_jax.data.decode import PLUGIN_SUFFIXES, UnreadablePictureError, check_header
from dar_jax.data.folder import find_parts
from dar_jax.data.listing import LeftOut, Seen
from dar_jax.data.names import is_hidden, listed
from dar_jax.data.sources import count_pictures, load_source

MAX_HEADERS = 1_000
FEW_PICTURES = 100
"""The standard error of a share of fewer is more than five per cent."""
MAX_CLASSES = 6
"""Classes whose pictures are counted one by one."""
MAX_LINES = 5
"""Reasons for leaving files out that are listed."""


def check(config: DataConfig, train: Source) -> str:
    """Check the held-out part and describe both.

    Args:
        config: the data.
        train: what is trained on: pictures, or groups of them.

    Returns:
        A table of at most a dozen lines: files seen, pictures per class and split, what is left out
        and why.

    Raises:
        ValueError: see `load_source`; or too many of the held-out pictures cannot be read.
    """
    train = getattr(train, "source", train)  # groups of pictures have one
    test = load_source(config, "test")
    warn_of_few(len(test))
    total = count_pictures(config)
    headers = _check_headers(config, test, total)
    found = {id(s): s for s in (getattr(part, "seen", None) for part in (train, test)) if s}
    seen = list(found.values())
    files = sum(one.files for one in seen)
    where = f"{config.source} {config.path}".strip()
    lines = [
        f"{where}: {total:,} pictures of {train.num_classes:,} classes"
        + (f", {files:,} files seen" if files else ""),
        f"  to train on  {_counts(train)}",
        f"  held out     {_counts(test)}; {headers}",
        *_absent(train, test),
        *_left_out(seen),
        *(f"  note         {remark}" for one in seen for remark in one.remarks[:1]),
    ]
    return "\n".join(lines)


def warn_of_few(count: int) -> None:
    """Warn if so many held-out pictures are too few for figures."""
    if count < FEW_PICTURES:
        logging.warning(
            "Only %d held-out picture%s: figures of so few say little%s; more are held out by "
            "--config.data.test_fraction=0.2, or as a folder val/ beside train/",
            count,
            "s" * (count != 1),
            ", and distances between sets of pictures need two" * (count == 1),
        )


def check_apart(config: DataConfig, workdir: str) -> None:
    """Raise ValueError if what a run writes would be taken for its data."""
    if config.source != "folder" or not config.path:
        return
    root, own = storage.to_path(config.path), storage.to_path(workdir)
    if storage.is_remote(root) != storage.is_remote(own):
        return
    if not storage.is_remote(root):
        root, own = root.resolve(), own.resolve()
    splits = find_parts(pathlib.Path(mirror.local(config).path))
    parts = [root] if splits is None else [root / name for name in splits[:2] if name]
    path = next((part for part in parts if own.is_relative_to(part)), None)
    if path is not None and not any(map(is_hidden, own.relative_to(path).parts)):
        raise ValueError(
            f"workdir {workdir} lies in data.path={config.path!r}, so that the pictures of the run "
            "would be taken for data; choose another"
        )


def _check_headers(config: DataConfig, test: Source, total: int) -> str:
    """Read the headers of held-out pictures, `total` being all; return what was read."""
    count = min(len(test), MAX_HEADERS)
    with ThreadPoolExecutor(config.num_threads) as pool:
        errors = list(filter(None, pool.map(functools.partial(_error, test), range(count))))
    for error in errors[:MAX_LINES]:
        logging.warning("Unreadable held-out picture: %s", error)
    too_many = len(errors) * len(test) > config.max_corrupt_fraction * total * count
    if too_many or len(errors) == count:
        raise ValueError(
            f"{len(errors)} of {count} held-out pictures cannot be read, more than "
            f"data.max_corrupt_fraction={config.max_corrupt_fraction} of all {total} pictures "
            f"allows; the first is {errors[0]}"
        )
    of_them = "all" if count == len(test) else f"the first {count:,}"
    return f"headers of {of_them} read, {len(errors)} unreadable"


def _error(source: Source, index: int) -> UnreadablePictureError | None:
    try:
        if isinstance(source, EncodedSource):
            picture = source.read(index)
            check_header(picture.data, picture.name)
        else:
            source[index]
    except UnreadablePictureError as error:
        return error
    return None


def _per_class(source: Source) -> np.ndarray | None:
    labels = getattr(source, "labels", None)
    return None if labels is None else np.bincount(labels, minlength=source.num_classes)


def _counts(source: Source) -> str:
    counts = _per_class(source)
    if counts is None:
        return f"{len(source):,}"
    if len(counts) <= MAX_CLASSES:
        each = ", ".join(f"{n} {c:,}" for n, c in zip(source.class_names, counts, strict=True))
        return f"{len(source):,}: {each}"
    low, high = int(counts.argmin()), int(counts.argmax())
    return (
        f"{len(source):,}: {counts[low]:,} ({source.class_names[low]}) to {counts[high]:,} "
        f"({source.class_names[high]}) of a class"
    )


def _absent(train: Source, test: Source) -> list[str]:
    """Say which classes have no pictures."""
    lines = []
    for part, title in ((train, "to train on"), (test, "held out")):
        counts = _per_class(part)
        absent = () if counts is None else np.flatnonzero(counts == 0)
        if len(absent):
            names = listed([part.class_names[label] for label in absent])
            lines.append(f"  no pictures  {title} of {names}")
    return lines


def _left_out(seen: Sequence[Seen]) -> list[str]:
    items = [item for one in seen for item in one.left_out]
    key = operator.attrgetter("reason")
    merged = [
        LeftOut(reason, sum(item.count for item in group), group[0].example)
        for reason, group in (
            (reason, list(group))
            for reason, group in itertools.groupby(sorted(items, key=key), key)
        )
    ]
    merged.sort(key=operator.attrgetter("count"), reverse=True)
    lines = [f"  left out     {item.count:,} {item.reason}, e.g. {item.example}" for item in merged]
    for number, item in enumerate(merged):
        if item.reason.endswith(PLUGIN_SUFFIXES):
            lines[number] += " (read after pip install 'dar-jax[images]')"
    if len(lines) > MAX_LINES:
        rest = merged[MAX_LINES - 1 :]
        more = sum(item.count for item in rest)
        reasons = ", ".join(item.reason for item in rest)
        lines[MAX_LINES - 1 :] = [f"  left out     {more:,} more: {reasons}"]
    return lines
