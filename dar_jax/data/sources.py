"""Sources of labelled pictures by the name that `DataConfig.source` gives them."""

from collections.abc import Callable

from absl import logging

from dar_jax.common import storage
from dar_jax.data import mirror
from dar_jax.data.base import READING_KEYS, SPLITS, DataConfig, Source, read_classes
from dar_jax.data.captions import with_captions
from dar_jax.data.codes import CODES, load_codes
from dar_jax.data.embedded import load_mnist, load_synthetic
from dar_jax.data.emoji import load_emoji
from dar_jax.data.folder import load_folder
from dar_jax.data.latents import load_latent_folder, load_latents
from dar_jax.data.names import listed
from dar_jax.data.records import load_records
from dar_jax.data.tar import load_tar
from dar_jax.data.tfds import PREFIX, load_tfds

__all__ = [
    "READING_KEYS",
    "SPLITS",
    "DataConfig",
    "Source",
    "check_num_classes",
    "check_pictures",
    "count_pictures",
    "load_pictures",
    "load_source",
]

LOADERS: dict[str, Callable[[DataConfig, str], Source]] = {
    "folder": load_folder,
    "records": load_records,
    "codes": load_codes,
    "latents": load_latents,
    "latent_folder": load_latent_folder,
    "tar": load_tar,
    "mnist": load_mnist,
    "emoji": load_emoji,
    "synthetic": load_synthetic,
}

CHOOSING = ("folder", "latent_folder", "tar")
"""Sources that read `DataConfig.classes`."""
WITHOUT_FILES = ("mnist", "synthetic")
ENCODED = ("codes", "latents", "latent_folder")
"""Sources of what models have made of pictures."""


def load_source(config: DataConfig, split: str) -> Source:
    """Open the "train" or "test" split of the source that the config names.

    Raises:
        ValueError: the source is unknown, missing or empty.
    """
    if config.source.startswith(PREFIX):
        load = load_tfds
    elif config.source in LOADERS:
        load = LOADERS[config.source]
    else:
        names = ", ".join([*LOADERS, f"{PREFIX}NAME"])
        raise ValueError(f"unknown source {config.source!r}; available: {names}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; available: {', '.join(SPLITS)}")
    if config.path and config.source in WITHOUT_FILES:
        raise ValueError(
            f"data.path={config.path!r} is not read by source {config.source!r}, which needs no "
            "files: leave it empty, or set --config.data.source=folder"
        )
    source = load(mirror.local(config), split)
    if config.classes and config.source not in CHOOSING and not config.captions:
        _check_classes(config, source)
    if config.captions and config.source != CODES:
        source = with_captions(source)
    if not len(source):
        raise ValueError(f"the {split} split of source {config.source!r} has no pictures")
    return source


def _check_classes(config: DataConfig, source: Source) -> None:
    """Refuse a list of other classes than a source has that cannot choose among them."""
    if not storage.to_path(config.classes, "data.classes").exists():  # where a cache has come to
        logging.warning("data.classes=%r is not there; its source needs none", config.classes)
        return
    wanted = read_classes(config.classes) or {}
    for_people = tuple(wanted.values())
    if source.class_names not in (tuple(wanted), for_people):
        raise ValueError(
            f"data.classes={config.classes!r} has {listed(for_people)}, but source "
            f"{config.source!r} {listed(source.class_names)}, among which it cannot choose: leave "
            "data.classes empty"
        )
    if source.class_names != for_people:
        logging.warning("data.classes=%r: the source's own names are kept", config.classes)


def load_pictures(config: DataConfig, split: str) -> Source:
    """Open a split of pictures.

    Raises:
        ValueError: the source holds something else; see also `load_source`.
    """
    check_pictures(config)
    return load_source(config, split)


def check_pictures(config: DataConfig) -> None:
    """Raise ValueError if the source holds codes or latents."""
    if config.source in ENCODED:
        raise ValueError(
            f"config.data.source={config.source!r} has no pictures, which are needed here; set "
            "config.data.source and config.data.path to those that were encoded"
        )


def count_pictures(config: DataConfig) -> int:
    """Return how many pictures all splits have.

    Raises:
        ValueError: see `load_source`.
    """
    splits = ("train",) if config.source == "latent_folder" else SPLITS  # there one has all
    return sum(len(load_source(config, split)) for split in splits)


def check_num_classes(num_classes: int | None, source: Source) -> None:
    """Check that a model's labels are the source's.

    Args:
        num_classes: of the model; None if it knows no classes.
        source: of its training data.

    Raises:
        ValueError: the numbers differ.
    """
    if num_classes not in (None, source.num_classes):
        raise ValueError(
            f"config.model.num_classes={num_classes}, but the data have {source.num_classes} "
            "classes; use that number, or 0 to read it from the data"
        )
