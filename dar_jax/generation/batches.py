"""Images from a model directory with the options of `config.sample`, batch by batch."""

import dataclasses
import math
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from absl import logging

from dar_jax.common import image as images
from dar_jax.common import model_dir
from dar_jax.common.config_build import build
from dar_jax.common.progress import Progress
from dar_jax.common.typing import Any, Int, UInt8
from dar_jax.generation.image_set import FORMATS
from dar_jax.nn.compute import Compute
from dar_jax.parallel.sharding import BATCH_AXES, MeshConfig, make_mesh
from dar_jax.pipelines import (
    DarPipeline,
    KlVaePipeline,
    Pipeline,
    TokenizerPipeline,
    TransDiffPipeline,
    architecture_of,
    from_pretrained,
)
from dar_jax.training.checkpoint import CHECKPOINTS

Autoencoder = TokenizerPipeline | KlVaePipeline
"""Images to codes or latents and back; it draws none."""
AUTOENCODERS = {TokenizerPipeline: "a tokenizer", KlVaePipeline: "a KL autoencoder"}
"""What messages call them."""
MAX_CLASSES = 10
"""Classes that pictures show where no labels are given."""
DRAWING_OPTIONS = {*DarPipeline.drawing_options, *TransDiffPipeline.drawing_options}
"""Of which a kind of model has some."""


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """What is sampled, and how.

    Some of it is for one family: token guidance, temperature, top-k, top-p, prefixes and
    in-painting for D-AR, the solver for TransDiff; see `Pipeline.drawing_options`.

    Attributes:
        model: model directory; empty takes `WORKDIR/model`.
        untrained_model: model directory for a workdir in which no training has begun; empty: none.
        labels: classes to draw; empty takes the first ten, or all for a set of images.
        images_per_class: images of every class, side by side.
        guidance_scale: one scale; or the first and last of a ramp over the tokens (D-AR), or one
            for every pass (TransDiff).
        guidance_schedule: of that ramp: "linear" or "cosine".
        guidance_interval: first and last token that is guided; empty guides all.
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k most likely tokens; 0 is off.
        top_p: keep the most likely tokens up to this probability; 1 is off.
        num_steps: of the solver, in every pass.
        guidance_times: first and last time that is guided, 0 at the noise; empty guides all.
        solver: of the flow: "adams_bashforth2", "euler" or, TransDiff only, "euler_maruyama".
        drift_scale: of the stochastic steps.
        noise_scale: of the stochastic steps.
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
    untrained_model: str = ""
    labels: tuple[int, ...] = ()
    images_per_class: int = 10
    guidance_scale: tuple[float, ...] = (4.0,)
    guidance_schedule: str = "linear"
    guidance_interval: tuple[int, ...] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_steps: int = 100
    guidance_times: tuple[float, ...] = ()
    solver: str = "adams_bashforth2"
    drift_scale: float = 1.0
    noise_scale: float = 1.0
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
        ValueError: it cannot be read or does not draw what is asked for, or a block of the config
            is wrong.
    """
    settings = build(SampleConfig, config.sample.to_dict(), "config.sample")
    path = model_path(settings, workdir)
    check(settings, path)
    return settings, load_model(config, path)


def check(
    config: SampleConfig,
    path: str,
    otherwise: str = "name the model directory of a model over its tokens or latents",
) -> None:
    """Look at a model directory's config for mistakes, before weights are read or work begins.

    Args:
        config: what is sampled, and how.
        path: of the model directory.
        otherwise: what to do if the model there draws no images.

    Raises:
        ValueError: the model draws no images, or not the classes or in the way that is asked for.
    """
    cls, architecture = architecture_of(path)
    if not issubclass(cls, Pipeline):
        raise ValueError(f"{path} holds {AUTOENCODERS[cls]}, which draws no images: {otherwise}")
    if (config.prefix_image or config.inpaint_image) and not issubclass(cls, DarPipeline):
        raise ValueError(
            "config.sample.prefix_image and inpaint_image need a model of tokens (dar_prior)"
        )
    cls.check_options(architecture, **drawing(config, cls))
    classes_of(architecture.num_classes, config)


def load_model(config: ml_collections.ConfigDict, path: str) -> Pipeline | Autoencoder:
    """Load any model directory onto this process's devices.

    Raises:
        ValueError: it cannot be read, or a block of the config is wrong.
    """
    compute = build(Compute, config.compute.to_dict(), "config.compute")
    mesh = make_mesh(build(MeshConfig, config.mesh.to_dict(), "config.mesh"), jax.local_devices())
    logging.info("Model: %s", path)
    return from_pretrained(path, compute=compute, mesh=mesh)


def drawing(config: SampleConfig, pipeline: Pipeline | type[Pipeline]) -> dict[str, Any]:
    """How images are drawn, as `pipeline.stream` takes it.

    Raises:
        ValueError: an option is set that this pipeline does not have.
    """
    foreign = DRAWING_OPTIONS - set(pipeline.drawing_options)
    for field in dataclasses.fields(SampleConfig):
        value = getattr(config, field.name)
        if field.name in foreign and value != field.default:
            raise ValueError(
                f"config.sample.{field.name}={value} is no option of this kind of model; it takes "
                f"{', '.join(pipeline.drawing_options)}"
            )
    return {name: getattr(config, name) for name in pipeline.drawing_options}


def model_path(config: SampleConfig, workdir: str) -> str:
    """Where the model directory is: what the config names, or the workdir's own.

    A workdir in which training has begun and not ended has none: that is an error, later.
    """
    if config.model:
        return config.model
    own = pathlib.Path(workdir) / model_dir.WORKDIR_NAME
    untrained = not own.exists() and not (pathlib.Path(workdir) / CHECKPOINTS).exists()
    return config.untrained_model if untrained and config.untrained_model else str(own)


def classes_of(
    num_classes: int, config: SampleConfig, most: int | None = MAX_CLASSES
) -> tuple[int, ...]:
    """The labels that the config lists, or the first `most` classes.

    Raises:
        ValueError: a label is no class of the model.
    """
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
        stream = pipeline.stream(
            pad(labels[part], size), **options(config, pipeline, first), **rows
        )
        steps = list(stream)
        count = len(labels[part])
        previews = np.stack([images.to_pixels(step.images)[:count] for step in steps])
        yield Batch(labels[part], previews, _kept(pipeline, steps[-1], count))
        progress.add(count)


def _kept(pipeline: Pipeline, generated: Any, count: int) -> dict[str, np.ndarray]:
    """Fetch what the pipeline keeps beside the first `count` images."""
    return {name: np.asarray(getattr(generated, name))[:count] for name in pipeline.kept_fields}


def identity(config: SampleConfig, pipeline: Pipeline, fingerprint: str) -> dict[str, Any]:
    """Everything that the images of a set depend on, besides their labels.

    Args:
        config: how they are drawn.
        pipeline: the model.
        fingerprint: of its model directory.
    """
    return {
        "model": fingerprint,
        "dtype": pipeline.compute.dtype,
        "seed": config.seed,
        **drawing(config, pipeline),
    }


def whole_batch(pipeline: Pipeline | Autoencoder, size: int) -> int:
    """The least batch size from `size` on that divides over the devices."""
    shards = math.prod(pipeline.mesh.shape[axis] for axis in BATCH_AXES)
    return math.ceil(size / shards) * shards


def pad(values: np.ndarray, size: int) -> np.ndarray:
    """Repeat the last row up to `size` rows: another batch size would compile everything again."""
    return np.pad(values, [(0, size - len(values))] + [(0, 0)] * (values.ndim - 1), "edge")


def options(config: SampleConfig, pipeline: Pipeline, first_index: int) -> dict[str, Any]:
    """All options of `pipeline.stream` for the images from `first_index` on."""
    rng = jax.random.key(config.seed)
    return dict(rng=rng, first_index=first_index, **drawing(config, pipeline))
