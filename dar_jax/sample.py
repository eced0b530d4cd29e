"""`--mode=sample`: labels to a grid of images, a strip of previews and the indices."""

import dataclasses
import pathlib
import time

import jax
import ml_collections
import numpy as np
from absl import logging
from PIL import Image

from dar_jax.common import image as images
from dar_jax.common.config import build
from dar_jax.nn.compute import Compute
from dar_jax.pipelines import DarPipeline, Guidance, from_pretrained
from dar_jax.sampling.logits import SamplingConfig

MAX_CLASSES = 10
"""Classes that are drawn where no labels are given."""
STRIP_ROWS = 10


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """What is sampled, and how.

    Attributes:
        model: model directory; empty takes `WORKDIR/model`.
        labels: classes to draw; empty takes the first ten.
        images_per_class: images of every class, side by side.
        guidance_scale: one scale, or the first and last of a linear ramp.
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k most likely tokens; 0 is off.
        top_p: keep the most likely tokens up to this probability; 1 is off.
        batch_size: images generated at a time.
        seed: image i depends on this seed, i and its label only.
    """

    model: str = ""
    labels: tuple[int, ...] = ()
    images_per_class: int = 10
    guidance_scale: tuple[float, ...] = (4.0,)
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    batch_size: int = 100
    seed: int = 0

    def __post_init__(self):
        if len(self.guidance_scale) not in (1, 2):
            raise ValueError(
                f"guidance_scale={self.guidance_scale} must be one scale or (first, last)"
            )
        if self.images_per_class < 1 or self.batch_size < 1:
            raise ValueError("images_per_class and batch_size must be at least 1")
        SamplingConfig(self.temperature, self.top_k, self.top_p)

    @property
    def guidance(self) -> Guidance:
        """As the pipelines take it."""
        scale = tuple(map(float, self.guidance_scale))
        return scale if len(scale) == 2 else scale[0]


def load_dar(config: SampleConfig, compute: Compute, workdir: str) -> DarPipeline:
    """Load the model directory that the config names.

    Raises:
        ValueError: it cannot be read or is no D-AR prior.
    """
    path = config.model or str(pathlib.Path(workdir) / "model")
    pipeline = from_pretrained(path, compute=compute)
    if not isinstance(pipeline, DarPipeline):
        raise ValueError(f"{path} holds a tokenizer; sampling needs a prior's model directory")
    return pipeline


def generate(
    pipeline: DarPipeline, labels: np.ndarray, config: SampleConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Generate one image per label.

    Returns:
        Previews uint8 [groups, B, H, W, 3], the last of which are the images; indices [B, N].
    """
    previews, indices = [], []
    for first in range(0, len(labels), config.batch_size):
        part = labels[first : first + config.batch_size]
        # A short last batch would compile all programs again.
        padded = np.pad(part, (0, min(config.batch_size, len(labels)) - len(part)))
        stream = pipeline.stream(
            padded,
            rng=jax.random.key(config.seed),
            guidance_scale=config.guidance,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            first_index=first,
        )
        steps = list(stream)
        pixels = [images.to_pixels(preview.images)[: len(part)] for preview in steps]
        previews.append(np.stack(pixels))
        indices.append(np.asarray(steps[-1].indices)[: len(part)])
        logging.info("%d of %d images", first + len(part), len(labels))
    return np.concatenate(previews, axis=1), np.concatenate(indices)


def sample(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Write `samples/grid.png`, `samples/previews.png` and `samples/samples.npz`.

    Raises:
        ValueError: the model cannot be read, or a label is no class of it.
    """
    settings = build(SampleConfig, config.sample.to_dict(), "config.sample")
    compute = build(Compute, config.compute.to_dict(), "config.compute")
    pipeline = load_dar(settings, compute, workdir)
    num_classes = pipeline.prior.config.num_classes
    classes = settings.labels or tuple(range(min(MAX_CLASSES, num_classes)))
    wrong = [label for label in classes if not 0 <= label < num_classes]
    if wrong:
        raise ValueError(
            f"config.sample.labels: {wrong[0]} is no class, expected 0..{num_classes - 1}"
        )
    labels = np.repeat(np.int32(classes), settings.images_per_class)
    start = time.monotonic()
    previews, indices = generate(pipeline, labels, settings)
    seconds = time.monotonic() - start
    logging.info("%d images in %.1f s, compilation included", len(labels), seconds)

    directory = pathlib.Path(workdir) / "samples"
    directory.mkdir(parents=True, exist_ok=True)
    write_pictures(directory, previews, [class_name(pipeline, c) for c in classes])
    np.savez(directory / "samples.npz", labels=labels, indices=indices, images=previews[-1])
    logging.info("Wrote %s/{grid.png,previews.png,samples.npz}", directory)


def write_pictures(directory: pathlib.Path, previews: np.ndarray, names: list[str]) -> None:
    """Write the grid (a row per class) and the strip (a row per sample, previews side by side)."""
    per_class = previews.shape[1] // len(names)
    grid = images.labelled_grid(previews[-1], names, columns=per_class)
    Image.fromarray(grid).save(directory / "grid.png")
    first_of_class = previews[:, ::per_class][:, :STRIP_ROWS]
    rows = first_of_class.swapaxes(0, 1).reshape(-1, *previews.shape[2:])
    strip = images.labelled_grid(rows, names[:STRIP_ROWS], columns=len(previews))
    Image.fromarray(strip).save(directory / "previews.png")


def class_name(pipeline: DarPipeline, label: int) -> str:
    """Name and index of a class, once if they are the same."""
    name = pipeline.class_names[label] if label < len(pipeline.class_names) else str(label)
    return name if name == str(label) else f"{name} ({label})"
