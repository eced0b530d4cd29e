"""How well images fit their prompts by a CLIP (Hessel et al. 2021, arXiv:2104.08718).

    clip_score      100 times the mean of max(cos(image, prompt), 0), as torchmetrics has it; the
                    paper has 2.5 for 100
    clip_retrieval  share of the images to which of all prompts their own is the nearest

Images are resized by Pillow's bicubic filter to CLIP's size, as its own preprocessing does.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dar_jax.common import storage
from dar_jax.common.batches import pad
from dar_jax.common.typing import Array, Float, UInt8
from dar_jax.evaluation.feature_store import PIECE, FeatureStore
from dar_jax.evaluation.image_sources import GeneratedImages
from dar_jax.models.text.clip import Clip
from dar_jax.models.text.encoder import ROWS, open_encoder
from dar_jax.models.text.layers import Weights

EMBEDDING = "embedding"
NUM_TOKENS = 77
"""Of a text; the rest is cut."""


class ClipScore:
    """A CLIP as a judge, and as the network of a `FeatureStore`.

    Attributes:
        name: of the network.
        identity: which one it is.
    """

    name = "clip"

    def __init__(self, weights: str, directory: storage.Path):
        """Find the CLIP; its weights are read when they are needed.

        Args:
            weights: directory or address of a CLIP in the hub's form, see `models.text.encoder`.
            directory: for the embeddings of images.

        Raises:
            ValueError: there is none, or something else.
        """
        self._encoder = open_encoder(weights, NUM_TOKENS)
        if not isinstance(self._encoder.architecture, Clip):
            raise ValueError(f"config.evaluate.clip={weights!r} is a text encoder, but no CLIP")
        self._clip = self._encoder.architecture
        self.identity = f"{self.name}-{self._encoder.digest}"
        self._store = FeatureStore(directory, self)

    @property
    def dims(self) -> dict[str, int]:
        return {EMBEDDING: len(self._encoder.weights["visual_projection.weight"])}

    def features(self, pixels: UInt8[np.ndarray, "N H W 3"]) -> dict[str, np.ndarray]:
        """Embed images: float32 [N, D]."""
        found = [np.zeros((0, self.dims[EMBEDDING]), np.float32)]
        for first in range(0, len(pixels), ROWS):
            part = [resize(image, self._clip.image_size) for image in pixels[first : first + ROWS]]
            batch = pad(np.stack(part), ROWS)
            found.append(np.asarray(_embed_images(self._clip, self._encoder.weights, batch)))
            found[-1] = found[-1][: len(part)]
        return {EMBEDDING: np.concatenate(found)}

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Embed texts."""
        found = []
        for first in range(0, len(texts), ROWS):
            features, _ = self._encoder.encode(texts[first : first + ROWS])
            found.append(self._clip.embed_texts(self._encoder.weights, jnp.asarray(features)))
        return np.concatenate(found)

    def metrics(self, images: GeneratedImages) -> dict[str, float]:
        """Compute both; of one prompt there is no retrieval."""
        prompts = images.pieces.labels_of(0, len(images))
        texts, own = np.unique(prompts, return_inverse=True)
        embedded = _normed(self.embed_texts(texts.tolist()))
        seen = _normed(self._store.features(images)[EMBEDDING])
        cosines = np.einsum("nd,nd->n", seen, embedded[own])
        parts = np.array_split(seen, len(seen) // PIECE + 1)
        nearest = np.concatenate([np.argmax(part @ embedded.T, axis=1) for part in parts])
        metrics = {"clip_score": 100 * float(np.maximum(cosines, 0).mean())}
        if len(texts) > 1:
            metrics["clip_retrieval"] = float(np.mean(nearest == own))
        return metrics


def resize(pixels: UInt8[np.ndarray, "H W 3"], size: int) -> UInt8[np.ndarray, "s s 3"]:
    """Return the middle of the image, its shorter side being `size` pixels."""
    image = Image.fromarray(pixels)
    short = min(image.size)
    width, height = (size * side // short for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _normed(vectors: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@functools.partial(jax.jit, static_argnames="clip")
def _embed_images(
    clip: Clip, weights: Weights, pixels: UInt8[Array, "B H W 3"]
) -> Float[Array, "B D"]:
    with jax.default_matmul_precision("highest"):
        return clip.embed_images(weights, pixels / 255.0)
