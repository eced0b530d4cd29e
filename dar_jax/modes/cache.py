"""`--mode=cache`: a data set in the form that training reads fastest, in the workdir.

kind=images   encoded pictures in a few large files; train with `data.source=records`
kind=codes    the codes of config.tokenizer, see `caching.codes`; train with `data.source=codes`
kind=latents  the latents of config.vae, see `caching.latents`; train with `data.source=latents`
kind=references
              an index of groups of pictures of one class, WORKDIR/references.jsonl, see
              `data.references`; train with `data.references`
"""

import dataclasses
from collections.abc import Callable

import jax
import ml_collections
from absl import logging

from dar_jax.caching import codes, latents
from dar_jax.common.config_build import build
from dar_jax.common.files import replacing
from dar_jax.data import records, references
from dar_jax.data.sources import SPLITS, DataConfig, load_source
from dar_jax.parallel.workdir import open_workdir

INDEX_NAME = "references.jsonl"


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """What is cached.

    Attributes:
        kind: see the module's docstring.
        image_size: of images: cropped at the centre to this size; 0 keeps the files as they are.
        pictures_per_shard: records in one file.
    """

    kind: str = "images"
    image_size: int = 0
    pictures_per_shard: int = 8192

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}; available: {', '.join(KINDS)}")
        if self.image_size < 0:
            raise ValueError(f"image_size {self.image_size} is negative; 0 keeps the files")
        if self.pictures_per_shard < 1:
            raise ValueError(f"pictures_per_shard {self.pictures_per_shard} is not positive")


def cache(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Write the cache to `workdir`; the same command finishes one that was cut short.

    Raises:
        ValueError: the data or the workdir cannot be used.
    """
    settings = build(CacheConfig, config.cache.to_dict(), "config.cache")
    try:
        KINDS[settings.kind](config, settings, workdir)
    except OSError as error:
        raise ValueError(f"cannot write the cache to {workdir}: {error}") from error


def _cache_images(config: ml_collections.ConfigDict, settings: CacheConfig, workdir: str) -> None:
    data = build(DataConfig, config.data.to_dict(), "config.data")
    sources = {split: load_source(data, split) for split in SPLITS}
    records.write_images(
        data,
        open_workdir(workdir),
        sources=sources,
        image_size=settings.image_size,
        pictures_per_shard=settings.pictures_per_shard,
    )


def _cache_codes(config: ml_collections.ConfigDict, settings: CacheConfig, workdir: str) -> None:
    if "tokenizer" not in config:
        raise ValueError("kind='codes' needs a prior's config, which names config.tokenizer")
    codes.write_codes(config, workdir, settings.pictures_per_shard)


def _cache_latents(config: ml_collections.ConfigDict, settings: CacheConfig, workdir: str) -> None:
    if "vae" not in config:
        raise ValueError("kind='latents' needs a config of TransDiff, which names config.vae")
    latents.write_latents(config, workdir, settings.pictures_per_shard)


def _cache_references(
    config: ml_collections.ConfigDict, settings: CacheConfig, workdir: str
) -> None:
    del settings
    data = build(DataConfig, config.data.to_dict(), "config.data")
    source = load_source(data, "train")
    labels = references.labels_of(source)
    size = max(data.num_references, references.GROUP_SIZE)
    groups = references.make_groups(labels, source.class_names, size, seed=config.seed)
    path = open_workdir(workdir) / INDEX_NAME
    if jax.process_index() == 0:
        with replacing(path) as temporary, temporary.open("w") as file:
            file.writelines(references.lines_of(source, groups))
        logging.info("Wrote %s: %d groups of %d pictures", path, len(groups), len(labels))


KINDS: dict[str, Callable[[ml_collections.ConfigDict, CacheConfig, str], None]] = {
    "images": _cache_images,
    "codes": _cache_codes,
    "latents": _cache_latents,
    "references": _cache_references,
}
