"""Token codes of a data set in ArrayRecord shards (see `shards`), which a prior trains on.

A record is the label, 4 bytes, and the codes [crops, N] of all crops of one picture, 2 bytes each;
all little-endian. Which crop is seen is drawn anew every time, by the task.
"""

import dataclasses
import os
import struct

import grain
import numpy as np

from dar_jax.common import model_dir
from dar_jax.common.typing import Any, Int
from dar_jax.data import shards
from dar_jax.data.base import DataConfig, EncodedPicture, existing_directory

KIND = "codes"
LABEL = struct.Struct("<I")
CODE = np.dtype("<u2")
MAX_CODEBOOK_SIZE = 2 ** (8 * CODE.itemsize)


def pack(codes: Int[np.ndarray, "crops N"], label: int) -> bytes:
    """Make a record."""
    return LABEL.pack(label) + codes.astype(CODE).tobytes()


@dataclasses.dataclass(frozen=True, eq=False)
class CodeSource:
    """Codes of one split; `data.base.Source` with `codes` for `pixels`."""

    records: grain.sources.ArrayRecordDataSource
    num_tokens: int
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `{"codes": uint16 [crops, N], "label": int32 []}`."""
        record = self.records[index]
        codes = np.frombuffer(record, CODE, offset=LABEL.size).astype(np.uint16)
        (label,) = LABEL.unpack_from(record)
        return {"codes": codes.reshape(-1, self.num_tokens), "label": np.int32(label)}

    def read(self, index: int) -> EncodedPicture:
        """Refuse: the pictures are gone.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"source 'codes' holds codes, no pictures (asked for {index})")


def load_codes(config: DataConfig, split: str) -> CodeSource:
    """Open a split of the cache in `config.path`.

    Raises:
        ValueError: it is missing, incomplete or broken.
    """
    directory = existing_directory(config)
    sidecar = shards.read_sidecar(directory, KIND)
    records = shards.open_shards(directory, split, sidecar["counts"][split])
    return CodeSource(records, sidecar["num_tokens"], tuple(sidecar["class_names"]))


def check_tokenizer(directory: str, tokenizer: str | os.PathLike) -> None:
    """Check that the codes are those of a tokenizer.

    Args:
        directory: of the cache.
        tokenizer: its model directory.

    Raises:
        ValueError: they are another's, or one of the two cannot be read.
    """
    expected = shards.read_sidecar(directory, KIND)["tokenizer"]
    found = model_dir.fingerprint(tokenizer)
    if found != expected:
        raise ValueError(
            f"{directory} holds codes of another tokenizer ({expected[:12]}) than {tokenizer} "
            f"({found[:12]}): set --config.tokenizer to that one, or cache the codes again"
        )
