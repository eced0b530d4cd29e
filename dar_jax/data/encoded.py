"""What a frozen model made of a data set, in ArrayRecord shards (see `shards`).

A record is the label, 4 bytes, and an array [views, ...], all little-endian: a view is one of the
crops of the picture that training may see.
"""

import dataclasses
import math
import os
import struct
from collections.abc import Mapping, Sequence

import grain
import numpy as np

from dar_jax.common import model_dir
from dar_jax.common.typing import Any
from dar_jax.data import shards
from dar_jax.data.base import EncodedPicture

LABEL = struct.Struct("<I")


@dataclasses.dataclass(frozen=True)
class Form:
    """What is encoded how.

    Attributes:
        kind: of the shards.
        name: of the array in an example.
        dtype: of the array, little-endian.
        model: key of the config that names the frozen model, and of the sidecar that holds the
            fingerprint of its model directory.
        keys: of the sidecar beside these, see `shards.read_sidecar`.
    """

    kind: str
    name: str
    dtype: np.dtype
    model: str
    keys: Mapping[str, shards.Key]

    def pack(self, array: np.ndarray, label: int) -> bytes:
        """Make a record."""
        return LABEL.pack(label) + array.astype(self.dtype).tobytes()


@dataclasses.dataclass(frozen=True, eq=False)
class CachedSource:
    """Records of one split; `data.base.Source` with `form.name` for `pixels`.

    Attributes:
        records: of the shards.
        form: of the records.
        shape: of one view.
        class_names: by label.
    """

    records: grain.sources.RandomAccessDataSource[bytes]
    form: Form
    shape: tuple[int, ...]
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the array [views, *shape] and `label`, int32 [].

        Raises:
            ValueError: the record is something else.
        """
        record = self.records[index]
        label = LABEL.unpack_from(record)[0] if len(record) > LABEL.size else self.num_classes
        view_bytes = self.form.dtype.itemsize * math.prod(self.shape)
        if label >= self.num_classes or (len(record) - LABEL.size) % view_bytes:
            raise ValueError(
                f"record {index} of the {self.form.kind} is not a label of {self.num_classes} "
                f"classes and arrays of {self.shape}: write the cache again with --mode=cache"
            )
        array = np.frombuffer(record, self.form.dtype, offset=LABEL.size)
        array = array.astype(self.form.dtype.newbyteorder("=")).reshape(-1, *self.shape)
        return {self.form.name: array, "label": np.int32(label)}

    def read(self, index: int) -> EncodedPicture:
        """Refuse: the pictures are gone.

        Raises:
            ValueError: always.
        """
        kind = self.form.kind
        raise ValueError(f"source {kind!r} holds {kind}, no pictures (asked for {index})")


def read_contents(directory: str | os.PathLike, form: Form) -> dict[str, Any]:
    """Read the sidecar of a complete cache of a form.

    Raises:
        ValueError: see `shards.read_sidecar`.
    """
    return shards.read_sidecar(directory, form.kind, {form.model: shards.TEXT, **form.keys})


def open_split(
    directory: str | os.PathLike, split: str, form: Form, shape: Sequence[int]
) -> CachedSource:
    """Open a split of a cache.

    Raises:
        ValueError: it is missing, incomplete or broken.
    """
    sidecar = read_contents(directory, form)
    records = shards.open_shards(
        directory, split, sidecar["counts"][split], sidecar.get(shards.ENDS, {})
    )
    return CachedSource(records, form, tuple(shape), tuple(sidecar["class_names"]))


def check_model(directory: str, form: Form, model: str | os.PathLike) -> None:
    """Check that a cache was made with a model.

    Args:
        directory: of the cache.
        form: of its records.
        model: the model directory.

    Raises:
        ValueError: it was made with another, or one of the two cannot be read.
    """
    expected = read_contents(directory, form)[form.model]
    found = model_dir.fingerprint(model_dir.locate(model))
    if found != expected:
        raise ValueError(
            f"{directory} holds {form.kind} of another {form.model} ({expected[:12]}) than {model} "
            f"({found[:12]}): set --config.{form.model} to that one, or cache the {form.kind} again"
        )
