"""Token codes of a data set (see `encoded`), which a prior trains on.

A record holds the codes [crops, N] of all crops of one picture, 2 bytes each. Which crop is seen is
drawn anew every time, by the task.

With captions a record is

    label, crops, captions          4 bytes each
    tokens of each caption          2 bytes each
    codes [crops, N]                2 bytes each
    features [tokens, F]            bfloat16, of all captions one after the other

all little-endian. An example then has the features of all captions, each padded in front to T
tokens, of which the pipeline draws one.
"""

import dataclasses
import pathlib
import struct
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from dar_jax.common import storage
from dar_jax.common.typing import Any, Bool, Float, Int
from dar_jax.data import encoded
from dar_jax.data.base import DataConfig, existing_directory
from dar_jax.data.shards import POSITIVE, Key

CODES, CAPTIONS, MASK = "codes", "captions", "caption_mask"
KEYS = {"num_tokens": POSITIVE}
VIEWS = ("crop", "flip", "padding")
"""Keys of what the sidecar says of the views of a picture: fields of the data's config."""
FORM = encoded.Form(CODES, CODES, np.dtype("<u2"), "tokenizer", KEYS)
MAX_CODEBOOK_SIZE = 2 ** (8 * FORM.dtype.itemsize)
HEADER = struct.Struct("<III")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ENCODER, DIGEST, LENGTH, WIDTH = "text_encoder", "text_digest", "condition_tokens", "caption_dim"
"""Keys of what the sidecar says of captions: fields of the prior's architecture."""
MAX_SHOWN = 40
"""Characters of a wrong value that are shown."""


def _describes_captions(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and all(isinstance(value.get(name), str) for name in (ENCODER, DIGEST))
        and all(POSITIVE.fits(value.get(name)) for name in (LENGTH, WIDTH))
    )


CAPTIONS_KEY = Key("what their encoder is and makes", _describes_captions)


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionedSource(encoded.CachedSource):
    """Codes and the features of captions.

    Attributes:
        text_shape: (T, F) of the features of one caption.
    """

    text_shape: tuple[int, int]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `codes` uint16 [crops, N], `label`, `captions` bfloat16 [captions, T, F] and
        `caption_mask` bool [captions, T].

        Raises:
            ValueError: the record is something else.
        """
        record = self.records[index]
        try:
            return self._read(record)
        except (ValueError, struct.error) as error:
            raise ValueError(
                f"record {index} of the codes has no captions of features {self.text_shape}: write "
                "the cache again with --mode=cache"
            ) from error

    def _read(self, record: bytes) -> dict[str, Any]:
        label, num_crops, num_captions = HEADER.unpack_from(record)
        if label >= self.num_classes or not num_captions:
            raise ValueError
        words = np.frombuffer(record, "<u2", offset=HEADER.size)
        lengths, codes, features = np.split(
            words, [num_captions, num_captions + num_crops * self.shape[0]]
        )
        most, width = self.text_shape
        mask = np.arange(most) >= most - lengths[:, None].astype(int)
        captions = np.zeros((*mask.shape, width), BFLOAT16)
        captions[mask] = features.astype("=u2").view(BFLOAT16).reshape(lengths.sum(), width)
        return {
            CODES: codes.astype("=u2").reshape(num_crops, *self.shape),
            "label": np.int32(label),
            CAPTIONS: captions,
            MASK: mask,
        }


def pack_captioned(
    codes: Int[np.ndarray, "crops N"],
    label: int,
    features: Float[np.ndarray, "captions T F"],
    mask: Bool[np.ndarray, "captions T"],
) -> bytes:
    """Make a record of codes and the features of captions."""
    lengths = mask.sum(axis=1)
    parts = [lengths.astype("<u2"), codes.astype("<u2")]
    parts.append(features[mask].astype(BFLOAT16).view(np.uint16).astype("<u2"))
    header = HEADER.pack(label, len(codes), len(features))
    return header + b"".join(part.tobytes() for part in parts)


def load_codes(config: DataConfig, split: str) -> encoded.CachedSource:
    """Open a split of the cache in `config.path`: `codes` uint16 [crops, N], and captions.

    Raises:
        ValueError: it is missing, incomplete or broken, or has captions where none are wanted, or
            none where they are.
    """
    directory = existing_directory(config)
    contents = encoded.read_contents(directory, FORM)
    captions = contents.get(CAPTIONS)
    if not CAPTIONS_KEY.fits(captions):
        raise ValueError(f"{directory} has {CAPTIONS}={captions}, expected {CAPTIONS_KEY.expected}")
    if config.captions != (captions is not None):
        raise ValueError(
            f"data.captions={config.captions}, but the codes in {directory} were written "
            f"{'without' if captions is None else 'with'} captions"
        )
    if split == "train":
        _check_views(directory, contents, config)
    source = encoded.open_split(directory, split, FORM, (contents["num_tokens"],))
    if captions is None:
        return source
    shape = captions[LENGTH], captions[WIDTH]
    return CaptionedSource(
        source.records, source.form, source.shape, source.class_names, text_shape=shape
    )


def _check_views(directory: pathlib.Path, contents: Mapping[str, Any], config: DataConfig) -> None:
    """Raise ValueError unless a cache has what training would see, where it says what it has."""
    for name in VIEWS:
        found, wanted = contents.get(name), getattr(config, name)
        if name in contents and (found or 0) != wanted:
            raise ValueError(
                f"config.data.{name}={wanted!r}, but the codes in {directory} were written with "
                f"{found or 0!r}: set it to that, or write them again with --mode=cache"
            )


def draw_caption(example: dict[str, Any], rng: np.random.Generator | None = None) -> dict[str, Any]:
    """Return the example with one of its captions, if it has any: the first without a generator."""
    if CAPTIONS not in example:
        return example
    number = 0 if rng is None else rng.integers(len(example[CAPTIONS]))
    return {**example, **{name: example[name][number] for name in (CAPTIONS, MASK)}}


def text_digest(directory: str) -> str:
    """Digest of the text encoder of a cache; "" where there is none yet.

    Raises:
        ValueError: it is incomplete or broken.
    """
    if not storage.entries(storage.to_path(directory)):
        return ""
    return (encoded.read_contents(directory, FORM).get(CAPTIONS) or {}).get(DIGEST, "")


def check_captions(directory: str, wanted: Mapping[str, Any]) -> None:
    """Raise ValueError unless the captions of a cache were made so.

    Args:
        directory: of the cache.
        wanted: values of `ENCODER`, `DIGEST`, `LENGTH` and `WIDTH`, of which the first may differ:
            an encoder may be anywhere.
    """
    found = encoded.read_contents(directory, FORM).get(CAPTIONS) or {}
    other = [name for name in (DIGEST, LENGTH, WIDTH) if found.get(name) != wanted[name]]
    if other:
        theirs, ours = (
            ", ".join(f"{name}={str(values.get(name))[:MAX_SHOWN]}" for name in other)
            for values in (found, wanted)
        )
        raise ValueError(
            f"the captions in {directory} were encoded with {theirs}, but the model has {ours}: "
            "set it to the same, or write the codes again with --mode=cache"
        )
