"""`--mode=sample`: pictures to look at, or a large set of images for evaluation."""

import jax
import numpy as np
from absl import logging
from PIL import Image

from dar_jax.common import image as images
from dar_jax.common import model_dir, storage
from dar_jax.common.files import replacing, write_npz
from dar_jax.common.progress import wait_for
from dar_jax.common.typing import UInt8
from dar_jax.config import Config
from dar_jax.generation import editing
from dar_jax.generation.batches import (
    class_name,
    drawn_of,
    generate,
    identity,
    load,
    load_model,
    model_path,
)
from dar_jax.generation.config import SampleConfig
from dar_jax.generation.image_set import ImageSet, label_array
from dar_jax.generation.image_sets import fill
from dar_jax.generation.reconstructions import reconstructions
from dar_jax.generation.resumable_arrays import is_whole_archive
from dar_jax.kinds.loading import open_model
from dar_jax.parallel import distributed
from dar_jax.parallel.workdir import open_workdir
from dar_jax.pipelines.base import Autoencoder, Pipeline

DIRECTORY_NAME = "samples"
"""Subdirectory of the workdir that everything is written to."""
SET_NAME = "set"
"""Subdirectory of it that holds the pieces of a set of images."""
STRIP_ROWS = 10


def sample(config: Config, workdir: str) -> None:
    """Write to `WORKDIR/samples` what the config asks for.

    - `num_images`: a resumable set, and `samples_NxHxWx3.npz` for the ADM evaluation suite;
    - `prefix_image`: `layout.png`, `variations.png` or `interpolation.png`;
    - `inpaint_image`: `inpainting.png`;
    - `originals`, or nothing of a tokenizer or autoencoder: `reconstructions.png`;
    - none of them: `grid.png`, `previews.png` and `samples.npz`.

    Raises:
        ValueError: a model, picture or directory cannot be used, or a label is not a class.
    """
    settings, data = config.sample, config.data
    asked = settings.num_images or settings.prefix_image or settings.inpaint_image
    if not asked:
        path = model_path(settings, workdir)
        if settings.originals or issubclass(open_model(path).kind.pipeline, Autoencoder):
            model = load_model(path, compute=config.compute, mesh=config.mesh)
            model = model if isinstance(model, Autoencoder) else model.autoencoder
            picture = reconstructions(model, settings, data)
            write(workdir, {"reconstructions.png": picture}, None)
            return
    pipeline = load(settings, workdir, compute=config.compute, mesh=config.mesh)
    if settings.num_images:
        make_set(pipeline, settings, workdir)
        return
    pictures = {}
    if settings.prefix_image:
        if settings.prefix_image_to:
            pictures["interpolation.png"] = editing.interpolation(pipeline, settings, data)
        else:
            name = "variations.png" if settings.variations else "layout.png"
            pictures[name] = editing.prefixes(pipeline, settings, data)
    if settings.inpaint_image:
        pictures["inpainting.png"] = editing.inpainting(pipeline, settings, data)
    arrays = None
    if not pictures:
        pictures, arrays = draw_grid(pipeline, settings)
    write(workdir, pictures, arrays)


def make_set(pipeline: Pipeline, settings: SampleConfig, workdir: str) -> None:
    """Make the images that `samples/set` still lacks, then one file of them all.

    Raises:
        ValueError: a label is not a class, or the directory holds images of other settings.
    """
    drawn = drawn_of(pipeline.prior.config, pipeline.class_names, settings, most=None)
    directory = open_workdir(workdir) / DIRECTORY_NAME
    image_set = ImageSet(directory / SET_NAME, settings.num_images, drawn, settings.format)
    fingerprint = model_dir.fingerprint(model_dir.locate(model_path(settings, workdir)))
    image_set.bind(identity(settings, pipeline, fingerprint))
    lacking = int(image_set.missing().sum())
    made, total = settings.num_images - lacking, settings.num_images
    logging.info("%s has %d of %d images", image_set.directory, made, total)
    fill(image_set, pipeline, settings)
    size = pipeline.output_size
    path = directory / f"samples_{total}x{size}x{size}x3.npz"
    if jax.process_index() == 0 and not (image_set.is_merged(path) and is_whole_archive(path)):
        image_set.merge(path)
    # A process that left a job long before the others would take them with it.
    wait_for(lambda: image_set.is_merged(path), "process 0 to write the merged file")
    logging.info("All images are in %s", path)


def draw_grid(
    pipeline: Pipeline, settings: SampleConfig
) -> tuple[dict[str, UInt8[np.ndarray, "_ _ 3"]], dict[str, np.ndarray]]:
    """Return the grid and the strip of previews, and the arrays that they show."""
    drawn = drawn_of(pipeline.prior.config, pipeline.class_names, settings)
    labels = np.repeat(label_array(drawn), settings.images_per_class)
    batches = list(generate(pipeline, labels, settings))
    previews = np.concatenate([batch.previews for batch in batches], axis=1)
    kept = {
        name: np.concatenate([batch.kept[name] for batch in batches])
        for name in pipeline.kept_fields
    }
    pictures = grid_and_strip(previews, [class_name(pipeline, label) for label in drawn])
    return pictures, dict(labels=labels, **kept, images=previews[-1])


def grid_and_strip(
    previews: UInt8[np.ndarray, "groups B H W 3"], names: list[str]
) -> dict[str, UInt8[np.ndarray, "_ _ 3"]]:
    """Draw the grid (a row per class) and the strip (a row per class, previews side by side)."""
    per_class = previews.shape[1] // len(names)
    first_of_class = previews[:, ::per_class][:, :STRIP_ROWS]
    rows = first_of_class.swapaxes(0, 1).reshape(-1, *previews.shape[2:])
    return {
        "grid.png": images.labelled_grid(previews[-1], names, columns=per_class),
        "previews.png": images.labelled_grid(rows, names[:STRIP_ROWS], columns=len(previews)),
    }


def write(
    workdir: str,
    pictures: dict[str, UInt8[np.ndarray, "_ _ 3"]],
    arrays: dict[str, np.ndarray] | None,
) -> None:
    """Write pictures, and arrays as `samples.npz`, to `WORKDIR/samples`; by process 0."""
    directory = open_workdir(workdir) / DIRECTORY_NAME
    distributed.of_first(lambda: _write(directory, pictures, arrays))


def _write(
    directory: storage.Path,
    pictures: dict[str, UInt8[np.ndarray, "_ _ 3"]],
    arrays: dict[str, np.ndarray] | None,
) -> None:
    storage.make_directory(directory)
    for name, picture in pictures.items():
        with replacing(directory / name) as temporary:
            Image.fromarray(picture).save(temporary)
        logging.info("Wrote %s", directory / name)
    if arrays is not None:
        write_npz(directory / "samples.npz", arrays)
        logging.info("Wrote %s", directory / "samples.npz")
