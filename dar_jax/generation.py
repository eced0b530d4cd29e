"""Images from a model directory with the options of `config.sample`, batch by batch."""

import dataclasses
import datetime
import functools
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from absl import logging

from dar_jax.common import image as images
from dar_jax.common import model_dir
from dar_jax.common.config import build
from dar_jax.common.typing import Any, Array, Int, UInt8
from dar_jax.evaluation.image_set import FORMATS, ImageSet
from dar_jax.nn.compute import Compute
from dar_jax.pipelines import Pipeline, from_pretrained
from dar_jax.training.sharding import BATCH_AXES, MeshConfig, make_mesh

MAX_CLASSES = 10
"""Classes that pictures show where no labels are given."""
REPORT_SECONDS = 5.0
"""Between two lines of progress."""
POLL_SECONDS = 10.0
"""Between two looks for what other processes write."""


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """What is sampled, and how.

    Attributes:
        model: model directory; empty takes `WORKDIR/model`.
        labels: classes to draw; empty takes the first ten, or all for a set of images.
        images_per_class: images of every class, side by side.
        guidance_scale: one scale, or the first and last of a ramp over the tokens.
        guidance_schedule: of that ramp: "linear" or "cosine".
        guidance_interval: first and last token that is guided; empty guides all.
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k most likely tokens; 0 is off.
        top_p: keep the most likely tokens up to this probability; 1 is off.
        solver: of D-AR's flow, see `flow.solvers`.
        batch_size: images that a process generates at a time.
        seed: image i depends on this seed, i and its label only.
        num_images: size of a set of images, classes in turns; 0 draws pictures to look at.
        format: of that set: "npz" or "png".
        prefix_image: picture file, or `test:3` for a picture of the data source: keep its first
            tokens and draw every label.
        prefix_tokens: numbers of tokens to keep.
        variations: draw this many images of one label from each prefix instead.
        inpaint_image: picture as above, to redraw in part.
        inpaint_mask: file as large as that picture, white where it is redrawn.
    """

    model: str = ""
    labels: tuple[int, ...] = ()
    images_per_class: int = 10
    guidance_scale: tuple[float, ...] = (4.0,)
    guidance_schedule: str = "linear"
    guidance_interval: tuple[int, ...] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    solver: str = "adams_bashforth2"
    batch_size: int = 100
    seed: int = 0
    num_images: int = 0
    format: str = "npz"
    prefix_image: str = ""
    prefix_tokens: tuple[int, ...] = (8, 16, 32)
    variations: int = 0
    inpaint_image: str = ""
    inpaint_mask: str = ""

    def __post_init__(self):
        for name, least in (
            ("images_per_class", 1),
            ("batch_size", 1),
            ("num_images", 0),
            ("variations", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.format not in FORMATS:
            raise ValueError(f"format={self.format!r} must be one of {', '.join(FORMATS)}")
        if self.variations and not self.prefix_image:
            raise ValueError(f"variations={self.variations} needs prefix_image=FILE")
        if bool(self.inpaint_image) != bool(self.inpaint_mask):
            raise ValueError("inpaint_image=FILE and inpaint_mask=FILE need each other")


class Batch(NamedTuple):
    """Some images of a list of labels.

    Attributes:
        labels: [n].
        previews: the last ones are the images.
        kept: what the pipeline keeps beside the images, [n, ...].
    """

    labels: Int[np.ndarray, " n"]
    previews: UInt8[np.ndarray, "previews n H W 3"]
    kept: dict[str, np.ndarray]


def load(config: ml_collections.ConfigDict, workdir: str) -> tuple[SampleConfig, Pipeline]:
    """Load the model directory that `config.sample` names onto this process's devices.

    Raises:
        ValueError: it cannot be read or draws no images, or a block of the config is wrong.
    """
    settings = build(SampleConfig, config.sample.to_dict(), "config.sample")
    compute = build(Compute, config.compute.to_dict(), "config.compute")
    mesh = make_mesh(build(MeshConfig, config.mesh.to_dict(), "config.mesh"), jax.local_devices())
    path = model_path(settings, workdir)
    pipeline = from_pretrained(path, compute=compute, mesh=mesh)
    if not isinstance(pipeline, Pipeline):
        raise ValueError(f"{path} holds a tokenizer; sampling needs a prior's model directory")
    # Here, so that a mistake comes before anything is written.
    pipeline.check_options(**drawing(settings, pipeline))
    return settings, pipeline


def drawing(config: SampleConfig, pipeline: Pipeline) -> dict[str, Any]:
    """How images are drawn, as `pipeline.stream` takes it."""
    return {name: getattr(config, name) for name in pipeline.drawing_options}


def model_path(config: SampleConfig, workdir: str) -> str:
    """Where the model directory is."""
    return config.model or str(pathlib.Path(workdir) / "model")


def classes_of(
    pipeline: Pipeline, config: SampleConfig, most: int | None = MAX_CLASSES
) -> tuple[int, ...]:
    """The labels that the config lists, or the first `most` classes.

    Raises:
        ValueError: a label is no class of the model.
    """
    num_classes = pipeline.num_classes
    wrong = [label for label in config.labels if not 0 <= label < num_classes]
    if wrong:
        raise ValueError(
            f"config.sample.labels: {wrong[0]} is no class, expected 0..{num_classes - 1}"
        )
    return config.labels or tuple(range(num_classes))[:most]


def class_name(pipeline: Pipeline, label: int) -> str:
    """Name and index of a class, once if they are the same."""
    name = pipeline.class_names[label] if label < len(pipeline.class_names) else str(label)
    return name if name == str(label) else f"{name} ({label})"


def generate(
    pipeline: Pipeline,
    labels: Int[np.ndarray, " B"],
    config: SampleConfig,
    **per_image: np.ndarray,
) -> Iterator[Batch]:
    """Generate one image per label, a batch at a time; image i draws from the seed and i.

    Args:
        pipeline: the models.
        labels: classes.
        config: options.
        **per_image: further arguments of `Pipeline.stream` with one row per label.

    Raises:
        ValueError: a label is no class.
    """
    progress = Progress(len(labels))
    size = whole_batch(pipeline, min(config.batch_size, len(labels)))
    for first in range(0, len(labels), size):
        part = slice(first, first + size)
        rows = {name: pad(values[part], size) for name, values in per_image.items()}
        options = _options(config, pipeline, first)
        stream = pipeline.stream(pad(labels[part], size), **options, **rows)
        steps = list(stream)
        count = len(labels[part])
        previews = np.stack([images.to_pixels(step.images)[:count] for step in steps])
        yield Batch(labels[part], previews, _kept(pipeline, steps[-1], count))
        progress.add(count)


def fill(image_set: ImageSet, pipeline: Pipeline, config: SampleConfig) -> None:
    """Generate the images that the set lacks, then wait until other processes have made theirs.

    Every process works on its own devices and shares nothing but the directory.
    """
    size = whole_batch(pipeline, config.batch_size)
    runs = list(image_set.runs(size, jax.process_index(), jax.process_count()))
    progress = Progress(sum(stop - first for first, stop in runs))
    finish = None
    for first, stop in runs:
        labels = pad(image_set.labels_of(first, stop), size)
        generated = pipeline.generate(labels, **_options(config, pipeline, first))
        pixels = images.to_pixels(generated.images)
        fetch_kept = functools.partial(_kept, pipeline, generated, stop - first)
        # Write one batch while the devices are at the next.
        if finish is not None:
            finish()
        finish = functools.partial(
            _write, image_set, progress, first, stop - first, pixels=pixels, fetch_kept=fetch_kept
        )
    if finish is not None:
        finish()
    wait_for(lambda: not image_set.missing().any(), "the images of other processes")


def _write(
    image_set: ImageSet,
    progress: "Progress",
    first: int,
    count: int,
    *,
    pixels: Array,
    fetch_kept: Callable[[], dict[str, np.ndarray]],
) -> None:
    image_set.write(first, np.asarray(pixels)[:count], fetch_kept())
    progress.add(count)


def _kept(pipeline: Pipeline, generated: Any, count: int) -> dict[str, np.ndarray]:
    """Fetch what the pipeline keeps beside the first `count` images."""
    return {name: np.asarray(getattr(generated, name))[:count] for name in pipeline.kept_fields}


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that other processes do to the directory that all share."""
    while not condition():
        logging.info("Waiting for %s", what)
        time.sleep(POLL_SECONDS)


def identity(config: SampleConfig, pipeline: Pipeline, workdir: str) -> dict[str, Any]:
    """Everything that the images of a set depend on, besides their labels."""
    return {
        "model": model_dir.fingerprint(model_dir.locate(model_path(config, workdir))),
        "dtype": pipeline.compute.dtype,
        "seed": config.seed,
        **drawing(config, pipeline),
    }


def whole_batch(pipeline: Pipeline, size: int) -> int:
    """The least batch size from `size` on that divides over the devices."""
    shards = math.prod(pipeline.mesh.shape[axis] for axis in BATCH_AXES)
    return math.ceil(size / shards) * shards


def pad(values: np.ndarray, size: int) -> np.ndarray:
    """Repeat the last row up to `size` rows: another batch size would compile everything again."""
    return np.pad(values, [(0, size - len(values))] + [(0, 0)] * (values.ndim - 1), "edge")


def _options(config: SampleConfig, pipeline: Pipeline, first_index: int) -> dict[str, Any]:
    rng = jax.random.key(config.seed)
    return dict(rng=rng, first_index=first_index, **drawing(config, pipeline))


class Progress:
    """Lines with the number of images made, the rate and the time left."""

    def __init__(self, total: int):
        self._total = total
        self._done = 0
        self._reported = time.monotonic()
        self._clock = None

    def add(self, count: int) -> None:
        """Count a batch; say so after the first, now and then, and at the end."""
        self._done += count
        now = time.monotonic()
        if self._clock is None:
            # Compilation is no part of the rate.
            self._clock = (self._done, now)
            logging.info(
                "%d of %d images in %.1f s, compilation included",
                self._done,
                self._total,
                now - self._reported,
            )
        elif now - self._reported > REPORT_SECONDS or self._done >= self._total:
            rate = (self._done - self._clock[0]) / (now - self._clock[1])
            left = datetime.timedelta(seconds=math.ceil((self._total - self._done) / rate))
            logging.info(
                "%d of %d images, %.3g images/s, %s left", self._done, self._total, rate, left
            )
        else:
            return
        self._reported = now
