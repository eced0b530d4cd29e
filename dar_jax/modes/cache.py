"""`--mode=cache`: a data set in the form that training reads fastest, in the workdir.

kind=images   encoded pictures in a few large files; train with `data.source=records`
kind=codes    the codes of config.tokenizer, with the features of captions if there are some, see
              `caching.codes`; train with `data.source=codes`
kind=latents  the latents of config.vae, see `caching.latents`; train with `data.source=latents`
kind=references
              an index of groups of pictures of one class, WORKDIR/references.jsonl, see
              `data.references`; train with `data.references`
"""

from collections.abc import Callable, Iterable

from absl import logging

from dar_jax.caching import codes, latents
from dar_jax.common import storage
from dar_jax.common.files import replacing
from dar_jax.config import Config
from dar_jax.data import records, references
from dar_jax.data.sources import SPLITS, load_pictures, load_source
from dar_jax.kinds.dar_prior import TOKENIZER, check_captions
from dar_jax.kinds.transdiff import VAE
from dar_jax.parallel import distributed
from dar_jax.parallel.workdir import open_workdir
from dar_jax.pipelines.dar_prompts import open_encoder_of

INDEX_NAME = "references.jsonl"


def cache(config: Config, workdir: str) -> None:
    """Write the cache to `workdir`; the same command finishes one that was cut short.

    Raises:
        ValueError: the data or the workdir cannot be used.
    """
    try:
        WRITERS[config.cache.kind](config, workdir)
    except OSError as error:
        raise ValueError(
            f"cannot write the cache to {workdir}: {error}; make room or check the permissions, "
            "and run it again"
        ) from error


def _cache_images(config: Config, workdir: str) -> None:
    data = config.data
    sources = {split: load_pictures(data, split) for split in SPLITS}
    records.write_images(
        data,
        open_workdir(workdir),
        sources=sources,
        image_size=config.cache.image_size,
        pictures_per_shard=config.cache.pictures_per_shard,
    )


def _cache_codes(config: Config, workdir: str) -> None:
    if TOKENIZER not in config.companions:
        raise ValueError("kind='codes' needs a prior's config, which names config.tokenizer")
    path, per_shard = config.companions[TOKENIZER], config.cache.pictures_per_shard
    check_captions(config.model, config.data)
    text_encoder = open_encoder_of(config.model) if config.data.captions else None
    codes.write_codes(
        config.data, path, workdir, pictures_per_shard=per_shard, text_encoder=text_encoder
    )


def _cache_latents(config: Config, workdir: str) -> None:
    if VAE not in config.companions:
        raise ValueError("kind='latents' needs a config of TransDiff, which names config.vae")
    path, per_shard = config.companions[VAE], config.cache.pictures_per_shard
    latents.write_latents(config.data, path, workdir, pictures_per_shard=per_shard)


def _cache_references(config: Config, workdir: str) -> None:
    source = load_source(config.data, "train")
    labels = references.labels_of(source)
    size = max(config.data.num_references, references.GROUP_SIZE)
    groups = references.make_groups(labels, source.class_names, size, seed=config.seed)
    path = open_workdir(workdir) / INDEX_NAME
    lines = references.lines_of(source, groups)
    distributed.of_first(lambda: _write_lines(path, lines))
    logging.info("Wrote %s: %d groups of %d pictures", path, len(groups), len(labels))


def _write_lines(path: storage.Path, lines: Iterable[str]) -> None:
    with replacing(path) as temporary, temporary.open("w") as file:
        file.writelines(lines)


WRITERS: dict[str, Callable[[Config, str], None]] = {
    "images": _cache_images,
    "codes": _cache_codes,
    "latents": _cache_latents,
    "references": _cache_references,
}
