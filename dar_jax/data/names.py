"""What names mean in a data set: one rule for folders, tars, image sets and caches.

Pictures. A regular file, or a link to one, whose suffix is one of `decode.picture_suffixes()`; what
    has another suffix or none is left out, counted and named at the start of a run.
Hidden. Names that begin with a dot, and `__MACOSX`, are never looked at.
Splits. `train` or `training`, and the first of `HELD_OUT_NAMES` that exists, in any case, are the
    two parts of the data where
    - the training part has folders, which are then the classes (or where labels are given
      otherwise, and both parts exist), or
    - both parts exist and nothing but parts is beside them: the data are then of one class.
    Anywhere else such a name is a class like another, with a warning.
Classes. The outermost folder below the split is the class; sorted as text, as torchvision's
    `ImageFolder` sorts them. Numbers that come in another order so are warned of.
Records. In tars with label files the members of a record share their name up to a dot, see
    `tar_records`. Elsewhere every picture file is a picture of its own, as Kaggle's `cat.0.jpg`.
"""

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from absl import logging

TRAIN_NAMES = ("train", "training")
HELD_OUT_NAMES = ("val", "valid", "validation", "test", "testing", "dev", "eval")
"""What data sets call the part that is held out, the first that exists being taken: the `test`
part of some (ImageNet's) has no labels."""
NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?")
MACOS_FOLDER = "__MACOSX"
MAX_LISTED = 5

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class Splits(NamedTuple):
    """Names of the folders that are the parts of a data set.

    Attributes:
        train: the training part.
        held_out: the held-out part; None if there is none.
        others: further parts that are left out, and folders that are no parts.
    """

    train: str
    held_out: str | None
    others: tuple[str, ...]


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder is not to be looked at."""
    return name.startswith(".") or name == MACOS_FOLDER


def is_split(name: str) -> bool:
    """Tell whether a name is that of a part of a data set."""
    return name.lower() in (*TRAIN_NAMES, *HELD_OUT_NAMES)


def printable(name: str) -> str:
    """Write a file's name so that it can be shown: one line, without bytes that are no UTF-8."""
    return UNPRINTABLE.sub(lambda match: _escaped(match[0]), name)


def find_splits(
    names: Iterable[str],
    below: Callable[[str], Collection[str]],
    where: str,
    *,
    labelled: bool = False,
) -> Splits | None:
    """Tell which of the folders of a data set are its parts; see the module's docstring.

    Args:
        names: of the folders.
        below: names of the folders in a folder; asked of those that a split may be called.
        where: they are, for messages.
        labelled: the folders are not what says the classes.

    Returns:
        None if there are none: the folders are classes.

    Raises:
        ValueError: two folders could be one part, or a part stands beside the classes.
    """
    names = list(names)
    train = _single([name for name in names if name.lower() in TRAIN_NAMES], where)
    held_out = next(
        (found for wanted in HELD_OUT_NAMES if (found := _single(_named(names, wanted), where))),
        None,
    )
    others = tuple(name for name in names if name not in (train, held_out))
    if train is not None:
        alone = all(is_split(name) for name in others)
        if held_out is not None and (labelled or alone):
            return Splits(train, held_out, others)
        if not labelled and below(train):
            return Splits(train, held_out, others)
    if not labelled:
        _check_classes(names, held_out, below, where)
    return None


def warn_of_names(classes: Sequence[str]) -> None:
    """Warn of names that may not mean what they seem to, given in the order of the labels.

    Numbers whose order as text is not that of the numbers, and names that differ by case, blanks or
    the way that their accents are encoded.
    """
    first: dict[str, str] = {}
    for name in classes:
        other = first.setdefault(unicodedata.normalize("NFC", name).casefold().strip(), name)
        if other != name:
            logging.warning(
                "%a and %a are two classes; if they are one, put their pictures together",
                other,
                name,
            )
            break
    if not all(map(NUMBER.fullmatch, classes)):
        return
    label = next(
        (i for i, name in enumerate(sorted(classes, key=float)) if classes[i] != name), None
    )
    if label is not None:
        logging.warning(
            "The names of the classes are numbers and are sorted as text, %s: label %d is class "
            "%r; list them in --config.data.classes=FILE.json for another order",
            listed(classes),
            label,
            classes[label],
        )


def listed(names: Sequence[str]) -> str:
    """Name the first of them, and say how many more there are."""
    more = f" and {len(names) - MAX_LISTED:,} more" if len(names) > MAX_LISTED else ""
    return ", ".join(repr(name) for name in names[:MAX_LISTED]) + more


def _escaped(character: str) -> str:
    code = ord(character)
    # Python reads a byte that is not an UTF-8 as this range of lone surrogates.
    return f"\\x{code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code:02x}"


def _named(names: Sequence[str], wanted: str) -> list[str]:
    return [name for name in names if name.lower() == wanted]


def _single(found: Sequence[str], where: str) -> str | None:
    if len(found) > 1:
        raise ValueError(
            f"{where} has both {found[0]!r} and {found[1]!r}, which may be the same part of the "
            "data; join them, or move one of them away"
        )
    return found[0] if found else None


def _check_classes(
    names: Sequence[str],
    held_out: str | None,
    below: Callable[[str], Collection[str]],
    where: str,
) -> None:
    """Refuse a held-out part beside the classes, and warn of classes that may be parts."""
    classes = {name for name in names if not is_split(name)}
    inside = set(below(held_out)) if held_out is not None else set()
    if inside and inside <= classes:
        raise ValueError(
            f"{where} has the classes {listed(sorted(classes))} and, beside them, {held_out!r} with"
            f" folders of the same names: move the classes to a folder 'train', beside {held_out!r}"
        )
    suspects = [name for name in names if is_split(name)]
    if suspects:
        logging.warning(
            "%s: %s is taken for a class, not for a part of the data", where, listed(suspects)
        )
