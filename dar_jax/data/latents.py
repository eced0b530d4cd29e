"""Latents of a data set, which a flow trains on: the moments of every picture and of its mirror.

`moments` float32 [2, h, w, 2 C] are what `models.kl_vae.KlVae.encode` gives: means, then
log-variances before clamping, not scaled. The input pipeline draws one of the two versions with
`data.flip`, else it takes the first; the task draws from the posterior. Two forms are read:

latents          shards of `--mode=cache --config.cache.kind=latents` (see `encoded`)
latent_folder    the published layout (TransDiff, MAR): PATH/CLASS/NAME.npz, NAME being the name of
                 the picture's file, with `moments` and `moments_flip` float32 [2 C, h, w]
"""

import dataclasses
import io
import os

import einops
import numpy as np

from dar_jax.common.files import ARCHIVE_ERRORS, read_regular
from dar_jax.common.typing import Any, Float
from dar_jax.data import encoded
from dar_jax.data.base import DataConfig, EncodedPicture, existing_directory, spread
from dar_jax.data.decode import MAX_FILE_BYTES, UnreadablePictureError
from dar_jax.data.folder import FolderSource, find_parts, open_folder, select
from dar_jax.data.listing import Seen
from dar_jax.data.names import printable
from dar_jax.data.shards import POSITIVE, POSITIVES

KEYS = {"image_size": POSITIVE, "shape": POSITIVES}
FORM = encoded.Form("latents", "moments", np.dtype("<f4"), "vae", KEYS)
SUFFIX = ".npz"
ARRAYS = ("moments", "moments_flip")
UNREADABLE = (*ARCHIVE_ERRORS, einops.EinopsError)
"""What reading arrays from a broken file raises."""


@dataclasses.dataclass(frozen=True, eq=False)
class LatentFolder:
    """The published layout; `data.base.Source` with `moments` for `pixels`."""

    files: FolderSource
    shape: tuple[int, ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.files.class_names

    @property
    def num_classes(self) -> int:
        return self.files.num_classes

    @property
    def paths(self) -> tuple[str, ...]:
        """Names of the pictures that the latents were made from."""
        return tuple(path.removesuffix(SUFFIX) for path in self.files.paths)

    @property
    def labels(self) -> tuple[int, ...]:
        return self.files.labels

    def name(self, index: int) -> str:
        """Say where a latent is."""
        return self.files.name(index)

    @property
    def seen(self) -> Seen:
        return self.files.seen

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `{"moments": float32 [2, h, w, 2 C], "label": int32 []}`.

        Raises:
            UnreadablePictureError: the file is broken; it may be skipped.
            ValueError: its latents are of another size than the first file's.
        """
        name = self.files.name(index)
        moments = read_moments(self.files.path(index))
        if moments.shape[1:] != self.shape:
            raise ValueError(f"{name} holds moments of {moments.shape[1:]}, others {self.shape}")
        return {"moments": moments, "label": np.int32(self.files.labels[index])}

    def read(self, index: int) -> EncodedPicture:
        """Refuse: the pictures are gone.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"source 'latent_folder' holds no pictures (asked for {index})")


def load_latents(config: DataConfig, split: str) -> encoded.CachedSource:
    """Open a split of the cache in `config.path`.

    Raises:
        ValueError: it is missing, incomplete or broken, or its pictures had another size.
    """
    _check_still(config)
    directory = existing_directory(config)
    sidecar = encoded.read_contents(directory, FORM)
    if sidecar["image_size"] != config.image_size:
        raise ValueError(
            f"{directory} holds latents of {sidecar['image_size']} pixels, not of "
            f"data.image_size={config.image_size}; cache them again, or use that size"
        )
    return encoded.open_split(directory, split, FORM, sidecar["shape"])


def load_latent_folder(config: DataConfig, split: str) -> LatentFolder:
    """Open the published layout in `config.path`.

    It holds training pictures alone, and the published index names all of them: both splits have
    them all, "test" in the order of `spread`.

    Raises:
        ValueError: it has no such files, or parts of a data set, or the first file is broken.
    """
    _check_still(config)
    directory = existing_directory(config)
    splits = find_parts(directory)
    if splits is not None:
        raise ValueError(
            f"data.path={config.path!r} has the part {splits.train!r}, but source 'latent_folder' "
            f"takes the class folders of one: use --config.data.path={directory / splits.train}"
        )
    files = open_folder(config, directory, (SUFFIX,))
    if split == "test":
        files = select(files, spread(files.paths))
    try:
        return LatentFolder(files, read_moments(files.path(0)).shape[1:])
    except UnreadablePictureError as error:
        raise ValueError(f"cannot read {error}") from error


def read_moments(path: str | os.PathLike) -> Float[np.ndarray, "2 h w C2"]:
    """Read one file of the published layout.

    Raises:
        UnreadablePictureError: it is no such file.
    """
    try:
        with np.load(io.BytesIO(read_regular(path, MAX_FILE_BYTES))) as file:
            moments = np.stack([file[name] for name in ARRAYS])
        return np.ascontiguousarray(einops.rearrange(moments, "v c h w -> v h w c"), np.float32)
    except UNREADABLE as error:
        (reason, *_) = str(error).splitlines() or [type(error).__name__]
        raise UnreadablePictureError(f"{printable(str(path))}: {reason}") from error


def check_latents(config: DataConfig, vae: str, shape: tuple[int, ...]) -> None:
    """Check that the latents of `config` are those of a VAE.

    Args:
        config: the data, with one of the sources of this module.
        vae: the VAE's model directory. The published layout does not say which VAE made it; there
            the shape has to do.
        shape: [h, w, 2 C] of the VAE's moments at `config.image_size`.

    Raises:
        ValueError: they are another's, or one of the two cannot be read.
    """
    if config.source == FORM.kind:
        encoded.check_model(config.path, FORM, vae)
        source = load_latents(config, "train")
    else:
        source = load_latent_folder(config, "train")
    if source.shape != tuple(shape):
        raise ValueError(
            f"{config.path} holds moments of {source.shape}, but {vae} makes {tuple(shape)} at "
            f"data.image_size={config.image_size}: use the VAE and the size that they are of"
        )


def _check_still(config: DataConfig) -> None:
    if config.padding:
        raise ValueError(f"data.padding={config.padding}: latents cannot be moved; set it to 0")
