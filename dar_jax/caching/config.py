"""What is cached: the block `cache`."""

import dataclasses

CACHES = ("images", "codes", "latents", "references")


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """What is cached.

    Attributes:
        kind: one of `CACHES`, see `dar_jax.modes.cache`.
        image_size: of images: cropped at the centre to this size; 0 keeps the files as they are.
        pictures_per_shard: records in one file.
    """

    kind: str = "images"
    image_size: int = 0
    pictures_per_shard: int = 8192

    def __post_init__(self):
        if self.kind not in CACHES:
            raise ValueError(f"unknown kind {self.kind!r}; available: {', '.join(CACHES)}")
        if self.image_size < 0:
            raise ValueError(f"image_size {self.image_size} is negative; 0 keeps the files")
        if self.pictures_per_shard < 1:
            raise ValueError(f"pictures_per_shard {self.pictures_per_shard} is not positive")
