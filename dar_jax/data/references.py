"""Groups of pictures of one class, the training examples of multi-reference autoregression (MRAR).

An index file has a line per group, in the published format (TransDiff):

    {"cate": "n01440764", "files": ["n01440764_10026.JPEG", ...]}

`files` are paths below the folder of the class, in the order in which the images come; of more than
are needed the first ones count. Sources whose pictures are not in folders know them by number:
their files are numbers in the training split, and `cate` is for the reader.

How the published groups were formed is not known. Here every class is put into a random order and
cut into groups, `ROUNDS` times over; the last group of a round is filled up from its first one.
"""

import dataclasses
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from dar_jax.common import storage
from dar_jax.common.files import parse_json
from dar_jax.common.typing import Any, Int
from dar_jax.data.base import DataConfig, EncodedPicture, EncodedSource, Source
from dar_jax.data.decode import UnreadablePictureError

MEMBERS = "members"
"""Entry of an example that holds the examples of its pictures."""
GROUP_SIZE = 4
"""Group size of the published index: three references and the image that they lead to."""
ROUNDS = 4
"""Groups that every picture is in, each time with others."""


@dataclasses.dataclass(frozen=True, eq=False)
class GroupSource:
    """Groups of a source's pictures; `data.base.Source` with `members` for `pixels`."""

    source: Source
    groups: Int[np.ndarray, "groups n"]

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    @property
    def num_classes(self) -> int:
        return self.source.num_classes

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `{"members": [example, ...], "label": int32 []}`.

        Raises:
            UnreadablePictureError: a picture is corrupt; the group may be skipped.
            ValueError: the pictures are of several classes.
        """
        members = [self.source[int(i)] for i in self.groups[index]]
        labels = sorted({int(member["label"]) for member in members})
        if len(labels) > 1:
            names = ", ".join(self.class_names[label] for label in labels)
            raise ValueError(
                f"group {index} of references has pictures of several classes: {names}"
            )
        return {MEMBERS: members, "label": np.int32(labels[0])}

    def read(self, index: int) -> EncodedPicture:
        """Refuse: a group is not a picture.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"group {index} of references is not a picture")


def group(source: Source, config: DataConfig, seed: int) -> Source:
    """Return the groups that the config asks for, or the source itself if it asks for none.

    Args:
        source: the training split.
        config: the data.
        seed: of the groups, where no index file says which.

    Raises:
        ValueError: the index cannot be read, names absent pictures or too few of them; or a class
            has too few pictures.
    """
    size = config.num_references
    if size == 1:
        return source
    if config.references:
        return GroupSource(source, read_index(config.references, source, size))
    labels = getattr(source, "labels", None)
    if labels is None:
        raise ValueError(
            f"data.num_references={size} of source {config.source!r} needs an index file: make one "
            "with --mode=cache --config.cache.kind=references, and set --config.data.references"
        )
    return GroupSource(source, make_groups(labels, source.class_names, size, seed=seed))


def make_groups(
    labels: Sequence[int] | Int[np.ndarray, " N"],
    class_names: Sequence[str],
    size: int,
    *,
    seed: int,
) -> Int[np.ndarray, "groups n"]:
    """Group pictures by class; see the module's docstring.

    Raises:
        ValueError: a class has fewer pictures than a group.
    """
    labels = np.asarray(labels)
    members = [np.flatnonzero(labels == label) for label in range(len(class_names))]
    for name, indices in zip(class_names, members, strict=True):
        if len(indices) < size:
            raise ValueError(
                f"class {name!r} has {len(indices)} pictures, but a group of references needs "
                f"{size}: add pictures, or leave the class out with data.classes"
            )
    groups = []
    for number in range(ROUNDS):
        for label, indices in enumerate(members):
            order = np.random.default_rng([seed, number, label]).permutation(indices)
            filled = np.concatenate([order, order[: -len(order) % size]])
            groups.append(filled.reshape(-1, size))
    return np.concatenate(groups)


def lines_of(source: Source, groups: Int[np.ndarray, "groups n"]) -> Iterable[str]:
    """Yield the lines of an index file."""
    paths = getattr(source, "paths", None)
    for indices in groups.tolist():
        if paths is None:
            category = source.class_names[int(source[indices[0]]["label"])]
            files = [str(index) for index in indices]
        else:
            category = _split(paths[indices[0]])[0]
            files = [_split(paths[index])[1] for index in indices]
        yield json.dumps({"cate": category, "files": files}) + "\n"


def labels_of(source: Source) -> Int[np.ndarray, " N"]:
    """Return the label of every picture, -1 where it cannot be read."""

    def label(index: int) -> int:
        try:
            if isinstance(source, EncodedSource):
                return source.read(index).label
            return int(source[index]["label"])
        except UnreadablePictureError:
            return -1

    labels = getattr(source, "labels", None)
    if labels is None:
        return np.array([label(index) for index in range(len(source))])
    return np.asarray(labels)


def read_index(path: str | os.PathLike, source: Source, size: int) -> Int[np.ndarray, "groups n"]:
    """Read an index file: the numbers of the pictures of every group.

    Raises:
        ValueError: it cannot be read, has no groups, or a line is something else, names fewer than
            `size` files or one that the source has not.
    """
    paths = getattr(source, "paths", None)
    numbers = None if paths is None else {name: number for number, name in enumerate(paths)}
    groups = []
    where = storage.to_path(path, "data.references")
    try:
        if where.exists() and not where.is_file():
            raise OSError("no regular file; expected a text")
        with io.TextIOWrapper(storage.open_binary(where), "utf-8") as file:
            for number, line in enumerate(file, start=1):
                category, files = _parse(line, f"{path} line {number}", size)
                names = [f"{category}/{name}" if category and numbers else name for name in files]
                groups.append([_find(n, numbers, source, f"{path} line {number}") for n in names])
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read data.references={str(path)!r}: {error}") from error
    if not groups:
        raise ValueError(f"data.references={str(path)!r} has no groups")
    return np.array(groups)


def _parse(line: str, where: str, size: int) -> tuple[str, list[str]]:
    try:
        content = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{where} is not a JSON: {error}") from error
    fits = isinstance(content, dict) and isinstance(content.get("cate"), str)
    files = content.get("files") if fits else None
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        raise ValueError(f'{where} must be {{"cate": "CLASS", "files": ["NAME", ...]}}')
    if len(files) < size:
        raise ValueError(
            f"{where} names {len(files)} files of {content['cate']!r}, expected at least {size}"
        )
    return content["cate"], files[:size]


def _find(name: str, numbers: Mapping[str, int] | None, source: Source, where: str) -> int:
    if numbers is not None:
        number = numbers.get(name)
    else:
        number = int(name) if name.isdecimal() and int(name) < len(source) else None
    if number is None:
        raise ValueError(
            f"{where} names {name!r}, which is none of the {len(source)} pictures to train on (a "
            "folder without val/ holds some out); make an index for this source with --mode=cache "
            "--config.cache.kind=references"
        )
    return number


def _split(path: str) -> tuple[str, str]:
    """Class folder, empty if there is none, and the path below it."""
    folder, separator, name = path.partition("/")
    return (folder, name) if separator else ("", path)
