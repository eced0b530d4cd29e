"""WebDataset tars: `NAME.jpg` beside `NAME.cls`, or `CLASS/NAME.jpg`.

`data.path` is a folder with tars anywhere below it, one tar, or many by braces as in shells,
`DIR/set-{000000..000146}.tar`. The headers are read once (`tar_index`); `tar_records` says which
pictures there are, and their labels. Folders that all pictures are in are passed over; the folder
below is the class.

Which pictures are held out is said, in this order, by

- folders `train/` and `val/` in the tars, which `names` says how they may be called;
- such a word in the name of a tar (`imagenet-val-0001.tar`), or of a folder that it is in, the
  nearest counting; of several held-out parts the first of `HELD_OUT_NAMES` is taken, the others are
  left out;
- chance: a fraction of every class, by the names of a tar and of a picture in it. Where the tars
  are, and how `data.path` is written, does not matter.
"""

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence

from dar_jax.data.base import (
    DataConfig,
    EncodedSource,
    existing_directory,
    hold_out,
    read_classes,
    spread,
)
from dar_jax.data.braces import expand
from dar_jax.data.listing import Leaving, Seen, list_files
from dar_jax.data.names import (
    HELD_OUT_NAMES,
    TRAIN_NAMES,
    Splits,
    find_splits,
    is_split,
    listed,
    printable,
    warn_of_names,
)
from dar_jax.data.tar_index import TAR_SUFFIXES, Member, open_tar
from dar_jax.data.tar_records import Record, read_records, read_texts

TRAIN, LEFT_OUT = "train", "left out"
CAPTIONED = "captioned"
"""The one class of pictures that have captions."""


@dataclasses.dataclass(frozen=True, eq=False)
class TarSource(EncodedSource):
    """Members of tars with their labels, and what else was seen there.

    `texts` are the `.txt`, or else the `.json`, beside them; `captions` what these say, if read.
    """

    members: tuple[Member, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]
    seen: Seen = Seen()
    texts: tuple[Member | None, ...] = ()
    captions: tuple[tuple[str, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        return printable(f"{self.members[index].path}:{self.members[index].name}")

    def fetch(self, index: int) -> tuple[bytes, int]:
        member = self.members[index]
        with open_tar(member.path) as tar:
            return member.read(tar), self.labels[index]


def load_tar(config: DataConfig, split: str) -> TarSource:
    """Open a split of the tars in `config.path`.

    Raises:
        ValueError: there are none, one cannot be read, a picture has no class or could be two
            things, or nothing can be held out.
    """
    tars = _find_tars(config)
    wanted = read_classes(config.classes)
    classes = None if wanted is None else tuple(wanted.items())
    whole, kept, held_out = _open(
        tars, config.path, classes, config.test_fraction, captioned=config.captions
    )
    if not kept and split == "train":
        raise ValueError(
            f"all tars of data.path={config.path!r} are held out by their names, e.g. "
            f"{printable(whole.members[0].path)}: add those to train on, or rename them"
        )
    if not held_out and split == "test":
        raise ValueError(
            f"the test split of data.path={config.path!r} has no pictures: no class has two, of "
            "which one could be held out"
        )
    return select(whole, kept if split == "train" else held_out)


@dataclasses.dataclass(frozen=True)
class Tars:
    """Paths of tars, the names of the folders between `data.path` and each, and what else is there.

    Attributes:
        paths: of the tars.
        names: of each, below `data.path`.
        seen: files that are no tars.
    """

    paths: tuple[pathlib.Path, ...]
    names: tuple[str, ...]
    seen: Seen


def _find_tars(config: DataConfig) -> Tars:
    path = pathlib.Path(config.path)
    if config.path and path.is_file():
        return Tars((path,), (path.name,), Seen())
    if "{" in config.path and not path.exists():
        return _expand(config.path)
    root = existing_directory(config)
    listing = list_files(root, TAR_SUFFIXES)
    leaving = Leaving()
    found: dict[tuple[int, int], pathlib.Path] = {}
    # Links are passed over where the file itself is there.
    for name in sorted(listing.paths, key=lambda name: ((root / name).is_symlink(), name)):
        try:
            status = (root / name).stat()
        except OSError as error:
            raise ValueError(f"cannot read the tar {root / name}: {error.strerror}") from error
        if found.setdefault((status.st_dev, status.st_ino), root / name) != root / name:
            leaving.add("link to a tar that is read already", name)
    if not found:
        raise ValueError(
            f"data.path={config.path!r} has no .tar files (looked for {', '.join(TAR_SUFFIXES)})"
        )
    paths = tuple(sorted(found.values()))
    names = tuple(str(path.relative_to(root)) for path in paths)
    beside = dataclasses.replace(listing.seen, files=listing.seen.files - len(listing.paths))
    return Tars(paths, names, beside.without(*leaving.result()))


def _expand(pattern: str) -> Tars:
    paths = tuple(dict.fromkeys(map(pathlib.Path, expand(pattern))))
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise ValueError(
            f"data.path={pattern!r} names {len(paths)} tars, {len(missing)} of which are no files:"
            f" {listed(missing)}"
        )
    start = pathlib.Path(pattern.partition("{")[0] + "x").parent
    return Tars(paths, tuple(str(path.relative_to(start)) for path in paths), Seen())


@functools.lru_cache(maxsize=2)
def _open(
    tars: Tars,
    where: str,
    wanted: tuple[tuple[str, str], ...] | None,
    fraction: float,
    *,
    captioned: bool,
) -> tuple[TarSource, list[int], list[int]]:
    """Return all pictures, and the indices of those to train on and of those held out."""
    found = [read_records(path) for path in tars.paths]
    records = [record for of_tar, _ in found for record in of_tar]
    seen = _sum([tars.seen, *(seen for _, seen in found)])
    if not records:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count, _ in seen.left_out[:3])
        raise ValueError(
            f"the tars of data.path={where!r} hold no pictures"
            + (f" (left out: {reasons})" if reasons else "")
        )
    is_labelled = captioned or _are_labelled(records, where)
    depth, splits = _layout({record.folders for record in records}, where, is_labelled)
    labels = [CAPTIONED] * len(records) if captioned else _labels(records, tars, depth, is_labelled)
    classes = _classes(labels, None if wanted is None else dict(wanted), where)
    words = [name for name, (of_tar, _) in zip(tars.names, found, strict=True) for _ in of_tar]
    roles = _roles(records, words, depth, splits)
    source, roles = _choose(records, labels, roles, classes=classes, seen=seen)
    names = [f"{os.path.basename(member.path)}:{member.name}" for member in source.members]
    apart = [role != TRAIN for role in roles]
    if not any(apart):
        return (source, *hold_out(names, source.labels, fraction))
    kept = [index for index, is_apart in enumerate(apart) if not is_apart]
    if isinstance(labels[0], str):
        _refuse_unknown(source, kept, apart, where)
    return source, kept, [index for index in spread(names) if apart[index]]


def _choose(
    records: Sequence[Record],
    labels: Sequence[int | str],
    roles: Sequence[str],
    *,
    classes: Mapping[int | str, str],
    seen: Seen,
) -> tuple[TarSource, list[str]]:
    """Return the pictures of the classes and parts that are used, and the roles of these."""
    leaving = Leaving()
    numbers = {label: number for number, label in enumerate(classes)}
    used: list[int] = []
    for index, (record, label, role) in enumerate(zip(records, labels, roles, strict=True)):
        if label not in numbers:
            leaving.add("in other classes", record.name)
        elif role == LEFT_OUT:
            leaving.add("in further held-out parts", record.name)
        else:
            used.append(index)
    source = TarSource(
        tuple(records[index].picture for index in used),
        tuple(numbers[labels[index]] for index in used),
        tuple(classes.values()),
        seen.without(*leaving.result()),
        tuple(records[index].text or records[index].document for index in used),
    )
    return source, [roles[index] for index in used]


def _are_labelled(records: Sequence[Record], where: str) -> bool:
    """Tell whether `.cls` or `.json` files say the classes; of all pictures or of none."""
    without = next((record for record in records if record.label is None), None)
    labelled = next((record for record in records if record.label is not None), None)
    if without is not None and labelled is not None:
        raise ValueError(
            f"the tars of data.path={where!r} name some classes by .cls or .json files "
            f"({printable(labelled.name)}) and others by folders ({printable(without.name)})"
        )
    return without is None


def _layout(
    folders: Collection[tuple[str, ...]], where: str, is_labelled: bool
) -> tuple[int, Splits | None]:
    """Return the number of folders above the one that is the class, and the parts if they say."""
    depth = 0
    while all(len(folder) > depth for folder in folders):
        below: dict[str, set[str]] = {}
        for folder in folders:
            below.setdefault(folder[depth], set()).update(folder[depth + 1 : depth + 2])
        place = "/".join((where, *next(iter(folders))[:depth]))
        splits = find_splits(sorted(below), below.__getitem__, place, labelled=is_labelled)
        if splits is not None:
            others = [name for name in splits.others if not is_split(name)]
            if others:
                raise ValueError(
                    f"{place} has the folder {others[0]!r} beside {splits.train!r}: either all "
                    "folders are classes or all are parts of the data; leave the others out"
                )
            return depth + 1, splits
        if len(below) > 1 or not all(len(folder) > depth + 1 for folder in folders):
            break
        depth += 1
    return depth, None


def _labels(
    records: Sequence[Record], tars: Tars, depth: int, is_labelled: bool
) -> list[int | str]:
    if is_labelled:
        return [record.label for record in records if record.label is not None]
    # One folder for all says nothing, where texts do.
    folders = {record.folders[depth : depth + 1] for record in records}
    if len(folders) == 1 and all(record.text for record in records):
        return _texts(tars, records)
    for record in records:
        if len(record.folders) <= depth:
            name = printable(record.name)
            raise ValueError(
                f"{record.picture.path}: {name} has no class; expected {name.partition('.')[0]}.cls"
                " or .json beside it, or a folder that is named after the class"
            )
    return [record.folders[depth] for record in records]


def _texts(tars: Tars, records: Sequence[Record]) -> list[int | str]:
    """Return what `.txt` files say, unless they are captions."""
    found = (label for path in tars.paths for label in read_texts(path))
    texts = [label for label in found if label is not None]
    if len(set(texts)) * 2 > len(texts):
        raise ValueError(
            f"{records[0].picture.path}: {printable(records[0].name)} has no class: its .txt holds "
            f"{texts[0]!r}, but {len(set(texts)):,} different texts beside {len(texts):,} pictures "
            "are captions, not classes; expected .cls or .json files, or folders named after them"
        )
    return texts


def _classes(
    labels: Sequence[int | str], wanted: Mapping[str, str] | None, where: str
) -> dict[int | str, str]:
    """Label in the tars -> name of the class, in the order of the labels."""
    found = set(labels)
    numbers = sorted(label for label in found if isinstance(label, int))
    texts = sorted(label for label in found if isinstance(label, str))
    if numbers and texts:
        raise ValueError(
            f"the tars of data.path={where!r} have numbers for labels, {numbers[0]}, and names, "
            f"{texts[0]!r}; expected one or the other"
        )
    if numbers:
        names = list(map(str, range(numbers[-1] + 1))) if wanted is None else list(wanted.values())
        if numbers[-1] >= len(names):
            raise ValueError(
                f"the tars of data.path={where!r} have labels {numbers[0]} to {numbers[-1]}, "
                f"but there are {len(names)} classes"
            )
        return dict(enumerate(names))
    if wanted is None:
        warn_of_names(texts)
        return {name: printable(name) for name in texts}
    missing = sorted(set(wanted) - found)
    if missing:
        raise ValueError(f"data.classes names {missing[0]!r}, which no tar of {where} has")
    return {**wanted}


def _roles(
    records: Sequence[Record], names: Sequence[str], depth: int, splits: Splits | None
) -> list[str]:
    """Return for every record `TRAIN`, the name of the held-out part, or `LEFT_OUT`."""
    if splits is not None and splits.held_out is not None:
        folders = [record.folders[depth - 1] for record in records]
        parts = {splits.train: TRAIN, splits.held_out: splits.held_out}
        return [parts.get(folder, LEFT_OUT) for folder in folders]
    of_tar = {name: _role(name) for name in dict.fromkeys(names)}
    used = next((name for name in HELD_OUT_NAMES if name in of_tar.values()), None)
    kept = {TRAIN, used}
    return [of_tar[name] if of_tar[name] in kept else LEFT_OUT for name in names]


def _role(name: str) -> str:
    """Return what the name of a tar below `data.path` says; the nearest part of it counts."""
    for part in reversed(pathlib.PurePath(name).parts):
        words = set(re.split(r"[^a-z]+", part.lower()))
        train = [word for word in TRAIN_NAMES if word in words]
        held_out = [word for word in HELD_OUT_NAMES if word in words]
        if train and held_out:
            raise ValueError(
                f"the name of {name} says both {train[0]!r} and {held_out[0]!r}: rename the file, "
                "or keep the parts apart in it by folders of these names"
            )
        if train or held_out:
            return TRAIN if train else held_out[0]
    return TRAIN


def _refuse_unknown(
    source: TarSource, kept: Sequence[int], apart: Sequence[bool], where: str
) -> None:
    """Refuse classes that are held out but not trained on."""
    trained_on = {source.labels[index] for index in kept}
    held_out = {label for label, is_apart in zip(source.labels, apart, strict=True) if is_apart}
    unknown = [source.class_names[label] for label in sorted(held_out - trained_on)]
    if unknown and kept:
        raise ValueError(
            f"the held-out part of data.path={where!r} has classes that the training part has not: "
            f"{listed(unknown)}; remove them, or list the classes to use in "
            "--config.data.classes=FILE.json"
        )


def _sum(seen: Sequence[Seen]) -> Seen:
    leaving = Leaving()
    for item in (item for one in seen for item in one.left_out):
        leaving.add(item.reason, item.example, item.count)
    remarks = tuple(remark for one in seen for remark in one.remarks)
    return Seen(sum(one.files for one in seen), leaving.result(), remarks)


def select(source: TarSource, indices: Sequence[int]) -> TarSource:
    """Return the source of some of the pictures, in this order, without their captions."""
    return dataclasses.replace(
        source,
        members=tuple(source.members[i] for i in indices),
        labels=tuple(source.labels[i] for i in indices),
        texts=tuple(source.texts[i] for i in indices),
    )
