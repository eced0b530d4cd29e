"""Images from a model directory with the options of `config.sample`, batch by batch."""

import math
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import jax
import numpy as np
from absl import logging

from dar_jax.common import image as images
from dar_jax.common import model_dir, storage
from dar_jax.common.batches import pad
from dar_jax.common.files import read_regular
from dar_jax.common.progress import Progress
from dar_jax.common.typing import Any, UInt8
from dar_jax.generation.config import SampleConfig
from dar_jax.kinds.loading import from_pretrained, open_model
from dar_jax.nn.compute import Compute
from dar_jax.parallel.sharding import MeshConfig, make_mesh, num_batch_shards
from dar_jax.pipelines.base import Autoencoder, Pipeline, check_sound, class_index, is_sound
from dar_jax.pipelines.dar_prompts import open_encoder_of
from dar_jax.training.checkpoint import CHECKPOINTS, latest_step

MAX_CLASSES = 10
"""Classes that pictures show where no labels are given."""
MAX_PROMPTS_BYTES = 2**26
JAX_DEFAULTS = {
    "jax_default_prng_impl": "threefry2x32",
    "jax_enable_x64": False,
    "jax_threefry_partitionable": True,
}
"""Settings, of the environment for instance, with which the same seed draws other images."""


class Batch(NamedTuple):
    """Some images of a list of labels.

    Attributes:
        labels: [n], or texts.
        previews: the last ones are the images.
        kept: what the pipeline keeps beside the images, [n, ...].
    """

    labels: np.ndarray
    previews: UInt8[np.ndarray, "previews n H W 3"]
    kept: dict[str, np.ndarray]


def load(config: SampleConfig, workdir: str, *, compute: Compute, mesh: MeshConfig) -> Pipeline:
    """Load the model directory that is named onto this process's devices.

    Args:
        config: which model, and what it has to draw.
        workdir: holds the model where none is named.
        compute: execution choices.
        mesh: laid over the devices of this process.

    Raises:
        ValueError: it cannot be read or does not draw what is asked for.
    """
    path = model_path(config, workdir)
    check(config, path)
    # `check` has seen that it draws images.
    return cast(Pipeline, load_model(path, compute=compute, mesh=mesh))


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
    opened = open_model(path)
    kind, architecture = opened.kind, opened.architecture
    pipeline = kind.pipeline
    if not issubclass(pipeline, Pipeline):
        raise ValueError(f"{path} holds {kind.noun}, which draws no images: {otherwise}")
    if (config.prefix_image or config.inpaint_image) and not pipeline.keeps_tokens:
        raise ValueError(
            f"config.sample.prefix_image and inpaint_image need a model of tokens; {path} holds "
            f"{kind.noun}"
        )
    config.sampling(opened.sampling).check(architecture)
    drawn_of(architecture, opened.class_names, config)
    if takes_texts(architecture):
        open_encoder_of(architecture)


def load_model(path: str, *, compute: Compute, mesh: MeshConfig) -> Pipeline | Autoencoder:
    """Load any model directory onto this process's devices.

    Raises:
        ValueError: it cannot be read.
    """
    logging.info("Model: %s", path)
    return from_pretrained(path, compute=compute, mesh=make_mesh(mesh, jax.local_devices()))


def model_path(config: SampleConfig, workdir: str) -> str:
    """Where the model directory is: what the config names, or the workdir's own.

    Raises:
        ValueError: training in the workdir has begun and not ended.
    """
    if config.model:
        return config.model
    own = storage.to_path(workdir) / model_dir.WORKDIR_NAME
    checkpoints = storage.to_path(workdir) / CHECKPOINTS
    if own.exists():
        _warn_if_outdated(own, checkpoints)
        return str(own)
    if not checkpoints.exists():
        return config.untrained_model or str(own)
    step = latest_step(checkpoints)
    reached = "before its first checkpoint" if step is None else f"at step {step}"
    raise ValueError(
        f"{workdir} holds a run that stopped {reached}, and no model yet: go on with --mode=train"
        + ("" if step is None else ", or write the model of that step with --mode=export")
    )


def _warn_if_outdated(own: storage.Path, checkpoints: storage.Path) -> None:
    reached = latest_step(checkpoints) if checkpoints.exists() else None
    if reached is None:
        return
    step = model_dir.load_config(model_dir.locate(own)).get("step")
    if step is not None and step < reached:
        logging.log_first_n(
            logging.WARNING,
            "%s is of step %d, and training has reached step %d: write the model of that one with "
            "--mode=export",
            1,
            own,
            step,
            reached,
        )


def takes_texts(architecture: Any) -> bool:
    """Whether a model draws captions, not classes."""
    return getattr(architecture, "caption_dim", None) is not None


def drawn_of(
    architecture: Any,
    class_names: Sequence[str],
    config: SampleConfig,
    most: int | None = MAX_CLASSES,
) -> tuple[int, ...] | tuple[str, ...]:
    """What the config says is drawn: prompts, by a model of captions, or labels: `classes_of`.

    Raises:
        ValueError: a label is not a class of the model, or it takes the other of the two.
    """
    if not takes_texts(architecture):
        if config.prompts:
            raise ValueError(
                f"config.sample.prompts={config.prompts!r}, but the model draws classes: use "
                "config.sample.labels"
            )
        return classes_of(architecture.num_classes, class_names, config, most)
    if not config.prompts:
        raise ValueError(
            "the model draws captions: set --config.sample.prompts='a red apple; a blue car', or a "
            "file with one a line"
        )
    return read_prompts(config.prompts)


def read_prompts(prompts: str) -> tuple[str, ...]:
    """Return the lines of a text or of a file, of one line the texts between semicolons; none is
    empty.

    Raises:
        ValueError: there are none, or the file is no text.
    """
    parts = prompts.split("\n" if "\n" in prompts else ";")
    if os.path.isfile(prompts):
        try:
            parts = read_regular(prompts, MAX_PROMPTS_BYTES).decode("utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read config.sample.prompts={prompts!r}: {error}") from error
    texts = tuple(filter(None, (" ".join(part.split()) for part in parts)))
    if not texts:
        raise ValueError(f"config.sample.prompts={prompts!r} has no text")
    return texts


def classes_of(
    num_classes: int,
    class_names: Sequence[str],
    config: SampleConfig,
    most: int | None = MAX_CLASSES,
) -> tuple[int, ...]:
    """The labels that the config lists, by index or name, or the first `most` classes.

    Raises:
        ValueError: a label is not a class of the model.
    """
    labels = []
    for label in config.labels:
        # On the command line `cat,dog` is one word.
        if isinstance(label, int):
            labels.append(label)
            _compare_with_names(label, class_names)
            continue
        names = [label] if label in class_names else label.split(",")
        labels += [class_index(name, class_names) for name in names]
    wrong = [label for label in labels if not 0 <= label < num_classes]
    if wrong:
        raise ValueError(
            f"config.sample.labels: {wrong[0]} is not a class, expected 0..{num_classes - 1}"
        )
    return tuple(labels) or tuple(range(num_classes))[:most]


def _compare_with_names(label: int, class_names: Sequence[str]) -> None:
    """Warn where a number is another class's name, as of numbers that are sorted as text."""
    name = str(label)
    if name in class_names and class_names.index(name) != label:
        logging.warning(
            "config.sample.labels: %d is taken as the number of a class; for the class of that "
            "name, number %d, write it in quotes: \"'%d'\"",
            *(label, class_names.index(name), label),
        )


def class_name(pipeline: Pipeline, label: int | str) -> str:
    """Name and index of a class, once if they are the same; a text as it is."""
    if isinstance(label, str):
        return label
    name = pipeline.class_names[label] if label < len(pipeline.class_names) else str(label)
    return name if name == str(label) else f"{name} ({label})"


def generate(
    pipeline: Pipeline,
    labels: np.ndarray,
    config: SampleConfig,
    **per_image: np.ndarray,
) -> Iterator[Batch]:
    """Generate one image per label, a batch at a time; image i draws from the seed and i.

    Args:
        pipeline: the models.
        labels: classes, or texts, [B].
        config: options.
        **per_image: further arguments of `Pipeline.stream` with one row per label.

    Raises:
        ValueError: a label is not a class, or what the model draws is not finite.
    """
    progress = Progress(len(labels))
    size = batch_size(config, pipeline, len(labels))
    for first in range(0, len(labels), size):
        part = slice(first, first + size)
        rows = {name: pad(values[part], size) for name, values in per_image.items()}
        how = {**options(config, pipeline, first), **rows}
        steps = list(pipeline.stream(pad(labels[part], size), **how))
        count = len(labels[part])
        kept = [getattr(steps[-1], name) for name in pipeline.kept_fields]
        check_sound(is_sound(steps[-1].images, *kept)[:count], first)
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
        "decode_dtype": pipeline.compute.decode_dtype,
        "residual_dtype": pipeline.compute.residual_jnp_dtype.name,
        **pipeline.compute.quantized,
        "seed": config.seed,
        **pipeline.settings(config.sampling(pipeline.sampling)),
        **unusual_settings(),
    }


def batch_size(config: SampleConfig, model: Pipeline | Autoencoder, num_images: int) -> int:
    """Images at a time: what the config says, or the model's directory, and no more than asked."""
    return whole_batch(model, min(config.batch_size or model.batch_size, num_images))


def unusual_settings() -> dict[str, Any]:
    """Return those of JAX's settings that draw other images, where they are not the defaults."""
    settings = {name: jax.config.values[name] for name in JAX_DEFAULTS}
    return {name: value for name, value in settings.items() if value != JAX_DEFAULTS[name]}


def whole_batch(pipeline: Pipeline | Autoencoder, size: int) -> int:
    """The least batch size from `size` on that divides over the devices."""
    shards = num_batch_shards(pipeline.mesh)
    return math.ceil(size / shards) * shards


def options(config: SampleConfig, pipeline: Pipeline, first_index: int) -> dict[str, Any]:
    """All options of `pipeline.stream` for the images from `first_index` on."""
    rng = jax.random.key(config.seed)
    sampling = config.sampling(pipeline.sampling)
    return dict(rng=rng, first_index=first_index, sampling=sampling)
