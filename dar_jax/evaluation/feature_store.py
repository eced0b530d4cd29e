"""Features of images on disk, so that none is computed twice.

They lie in pieces (`generation.resumable_arrays`) in a directory that is named after the images and
the network: a run that was killed goes on, several processes share the work, and comparisons with
the same images share the result. What is computed is the same for any number of processes.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from absl import logging

from dar_jax.common import digests, model_dir, storage
from dar_jax.common.checks import check_finite
from dar_jax.common.progress import Progress
from dar_jax.common.typing import Any, Float, UInt8
from dar_jax.evaluation.features import Extractor
from dar_jax.evaluation.image_sources import Images
from dar_jax.generation.resumable_arrays import Pieces

PIECE = 256
"""Images whose features are one file; more of them are lost when a run is killed."""


@dataclasses.dataclass(frozen=True)
class FeatureStore:
    """Features of one network in subdirectories of `directory`.

    Attributes:
        directory: where they are.
        extractor: the network.
        weights: directory of its weights, or "".
    """

    directory: storage.Path
    extractor: Extractor
    weights: str = ""

    def features(self, images: Images) -> dict[str, Float[np.ndarray, "N _"]]:
        """Read the features of all images, each kind one array; compute those that are missing.

        Raises:
            ValueError: an image or a file of features cannot be read, or a feature is not finite.
        """
        settings = {"images": images.identity, "network": self._network}
        pieces = Pieces(self.directory / f"features-{digest(settings)}", len(images))
        pieces.bind(settings)
        if total := int(pieces.missing().sum()):
            logging.info("Features (%s) of %d images", self.extractor.name, total)
            progress = Progress(total)
            for first, pixels in read_rounds(images, pieces, PIECE):
                made = self.extractor.features(pixels)
                for kind, array in made.items():
                    last = first + len(pixels) - 1
                    check_finite(
                        f"{kind} features ({self.extractor.name}) of images {first}..{last}", array
                    )
                pieces.save(first, made)
                progress.add(len(pixels))
        features = {kind: pieces.array(kind) for kind in self.extractor.dims}
        for kind, array in features.items():
            check_finite(f"{pieces.directory}: {kind}", array)
        return features

    @functools.cached_property
    def _network(self) -> dict[str, Any]:
        name = self.extractor.identity
        if not self.weights:
            return {"name": name}
        return {"name": name, "weights": model_dir.fingerprint(model_dir.locate(self.weights))}


def read_rounds(
    images: Images, pieces: Pieces, batch_size: int
) -> Iterator[tuple[int, UInt8[np.ndarray, "n H W 3"]]]:
    """Yield the first index and the images of what is missing, see `Pieces.rounds`.

    The next ones are being read meanwhile; each are to be written before others are asked for.
    """
    with ThreadPoolExecutor(1) as pool:
        for runs in pieces.rounds(batch_size):
            pending = None
            for run in itertools.chain(runs, [None]):
                following = run and (run[0], pool.submit(images.read, *run))
                if pending is not None:
                    yield pending[0], pending[1].result()
                pending = following


def digest(settings: Mapping[str, Any]) -> str:
    """A short name for settings of JSON types."""
    return digests.of_json(settings)[: digests.SHORT]
