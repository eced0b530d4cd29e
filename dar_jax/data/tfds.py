"""Data sets of TensorFlow Datasets, prepared as ArrayRecord and read without TensorFlow.

`source="tfds:NAME"`, with any image builder or prepared directory of that name: `imagenet2012`,
`cifar10`, `oxford_flowers102`, ... Preparing needs a builder that works without TensorFlow, as
those do:

    tensorflow_datasets.builder("cifar10", file_format="array_record").download_and_prepare()

With `data.captions` pictures need no label, as those of `tfds:coco_captions`; the captions are a
column, see `captions`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from dar_jax.data.base import DataConfig, EncodedSource
from dar_jax.data.names import HELD_OUT_NAMES
from dar_jax.data.tar import CAPTIONED

PREFIX = "tfds:"
IMAGE, LABEL = "image", "label"


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsSource(EncodedSource):
    """Records of a TFDS data source whose images are left encoded.

    `indices` are those of the pictures among the records; `captions` are theirs, if they are read.
    """

    records: Any
    title: str
    class_names: tuple[str, ...]
    indices: Sequence[int]
    captions: tuple[tuple[str, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return f"{self.title} record {self.indices[index]}"

    def record(self, index: int) -> dict[str, Any]:
        """Return all columns of a picture, its image encoded."""
        return self.records[self.indices[index]]

    def fetch(self, index: int) -> tuple[bytes, int]:
        record = self.record(index)
        return record[IMAGE], 0 if self.class_names == (CAPTIONED,) else int(record[LABEL])


def load_tfds(config: DataConfig, split: str) -> TfdsSource:
    """Open a split of the data set that `config.source` names, in the data_dir `config.path`.

    The held-out part is the first of `HELD_OUT_NAMES` that the data set has, or the end of its
    train split.

    Raises:
        ValueError: it is unknown, not prepared as ArrayRecord, or has no images with class labels.
    """
    import tensorflow_datasets as tfds  # takes half a second and is needed here only

    name = config.source.removeprefix(PREFIX)
    try:
        builder: Any = tfds.builder(name, data_dir=config.path or None)
    except (tfds.core.DatasetNotFoundError, ValueError, ImportError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"cannot open source {config.source!r}: {reason}") from error
    _check_features(builder.info, config)
    _check_prepared(builder, config)
    part = _split_of(builder.info.splits, config.test_fraction, split)
    records = builder.as_data_source(split=part, decoders={IMAGE: tfds.decode.SkipDecoding()})
    names = (CAPTIONED,) if config.captions else tuple(builder.info.features[LABEL].names)
    return TfdsSource(records, f"{config.source} {part}", names, range(len(records)))


def _check_features(info: Any, config: DataConfig) -> None:
    features, needed = info.features, "'image'"
    if not config.captions:
        needed += " and 'label' with class names"
    labelled = LABEL in features and hasattr(features[LABEL], "names")
    if IMAGE not in features or not (labelled or config.captions):
        raise ValueError(
            f"source {config.source!r} has no features {needed}; it has {', '.join(features)}"
        )


def _check_prepared(builder: Any, config: DataConfig) -> None:
    name = config.source.removeprefix(PREFIX)
    prepare = (
        f"prepare it once in Python: import tensorflow_datasets as tfds; tfds.builder({name!r}"
        + (f", data_dir={config.path!r}" if config.path else "")
        + ', file_format="array_record").download_and_prepare()'
    )
    if not builder.info.splits:
        raise ValueError(
            f"source {config.source!r} is not prepared in {builder.data_dir}; {prepare}"
        )
    if builder.info.file_format.value != "array_record":
        raise ValueError(
            f"source {config.source!r} in {builder.data_dir} has the format "
            f"{builder.info.file_format.value}, which cannot be read in random order; {prepare}"
        )


def _split_of(splits: Any, test_fraction: float, split: str) -> str:
    if "train" not in splits:
        names = ", ".join(splits) or "none"
        raise ValueError(f"the data set has no split 'train' to train on; its splits: {names}")
    held_out = next((name for name in HELD_OUT_NAMES if name in splits), None)
    if held_out is not None:
        return held_out if split == "test" else "train"
    kept = splits["train"].num_examples - max(
        1, round(splits["train"].num_examples * test_fraction)
    )
    return f"train[{kept}:]" if split == "test" else f"train[:{kept}]"
