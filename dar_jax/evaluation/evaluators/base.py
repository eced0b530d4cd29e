"""What evaluators share: the networks, the reference and the images that models are judged by.

Everything that an evaluation makes lies in `WORKDIR/evaluation`, in directories that are named
after what it depends on: images, features, distances of pairs. So a run that was killed goes on,
several processes share the work, and evaluations share what they have in common. Nothing depends on
the number of devices or processes, and on batch sizes only by rounding.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Protocol, cast, runtime_checkable

import jax
import numpy as np
from absl import logging
from PIL import Image

from dar_jax.common import model_dir, storage
from dar_jax.common.files import replacing
from dar_jax.common.typing import Any
from dar_jax.data.base import DataConfig
from dar_jax.evaluation.attributes import AttributeJudges, read_attributes
from dar_jax.evaluation.classifier import Classifier
from dar_jax.evaluation.clip_score import ClipScore
from dar_jax.evaluation.config import LIKELIHOOD, EvaluateConfig
from dar_jax.evaluation.distances import Comparison
from dar_jax.evaluation.feature_store import FeatureStore, digest
from dar_jax.evaluation.features import INCEPTION, FeatureExtractor
from dar_jax.evaluation.image_sources import (
    GeneratedImages,
    Images,
    SplitImages,
    open_images,
    read_all,
)
from dar_jax.evaluation.perceptual import LpipsMetric
from dar_jax.generation.batches import (
    check,
    class_name,
    drawn_of,
    identity,
    load_model,
    takes_texts,
)
from dar_jax.generation.config import SampleConfig
from dar_jax.generation.image_set import ImageSet
from dar_jax.generation.image_sets import fill
from dar_jax.generation.resumable_arrays import MANIFEST_NAME
from dar_jax.kinds.loading import open_model
from dar_jax.nn.compute import Compute
from dar_jax.parallel.sharding import MeshConfig, batch_sharding, make_mesh
from dar_jax.pipelines.base import Autoencoder, Pipeline

DIRECTORY_NAME = "evaluation"
"""Subdirectory of the workdir."""

Metrics = Mapping[str, float | int | list]


@runtime_checkable
class EvaluationBlocks(Protocol):
    """What an evaluation reads: fields of `dar_jax.config.Config`."""

    @property
    def evaluate(self) -> EvaluateConfig: ...
    @property
    def sample(self) -> SampleConfig: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def compute(self) -> Compute: ...
    @property
    def mesh(self) -> MeshConfig: ...


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model that is evaluated.

    Attributes:
        pipeline: the model.
        path: its model directory.
        fingerprint: of that directory.
    """

    pipeline: Pipeline | Autoencoder
    path: str
    fingerprint: str

    @property
    def autoencoder(self) -> Autoencoder:
        """The model itself, or the tokenizer or VAE in it."""
        if isinstance(self.pipeline, Autoencoder):
            return self.pipeline
        return self.pipeline.autoencoder

    @property
    def generator(self) -> Pipeline:
        """The model itself, where `Evaluation.load` has seen that it draws images."""
        return cast(Pipeline, self.pipeline)


class Evaluation:
    """What one config judges models by; networks and references are loaded once.

    Attributes:
        settings: what is measured.
        sampling: how images are drawn; of the captions of held-out pictures, where a model takes
            captions and no prompts are set.
        data: of the held-out images.
        directory: for what is made.
        store: of features of reconstructions; None if there are no distances of theirs.
        classifier: of the training images, or None.
        lpips: or None.
        clip: or None.
        attributes: judges of what prompts say, or None.
    """

    def __init__(self, config: EvaluationBlocks, workdir: str):
        """Load what models are judged by.

        Raises:
            ValueError: weights, reference or data cannot be had.
        """
        self.settings, self.sampling, self.data = config.evaluate, config.sample, config.data
        self._load_model = functools.partial(load_model, compute=config.compute, mesh=config.mesh)
        self.directory = storage.to_path(workdir) / DIRECTORY_NAME
        self.store = self._comparison = None
        stores = functools.cache(self._make_store)
        if self.settings.features and "reconstruction" in self.settings.names:
            self.store = stores(self._inception_input("pytorch_fid"))
        if self.settings.compares and self.settings.generates:
            self._comparison = Comparison(
                stores(self._inception_input("tensorflow")),
                self.settings.reference,
                self.data,
                self.settings.num_reference,
            )
        self.classifier = self.lpips = self.clip = None
        if self.settings.classifier and self.settings.images:
            logging.warning(
                "config.evaluate.classifier=True is left out: images=%s have no labels to judge",
                self.settings.images,
            )
        elif self.settings.classifier:
            self.classifier = self._fit_classifier()
        if self.settings.lpips and "reconstruction" in self.settings.names:
            self.lpips = LpipsMetric(self.settings.lpips)
        self.attributes = None
        if attributes := read_attributes(self.settings.attributes):
            self.attributes = AttributeJudges(attributes, self.data)
        if self.settings.clip:
            self.clip = ClipScore(self.settings.clip, self.directory)

    def _inception_input(self, published: str) -> str:
        """How images enter Inception; one way for other networks, which share their features."""
        own = published if self.settings.features == INCEPTION else "tensorflow"
        return self.settings.inception_input or own

    def _make_store(self, inception_input: str) -> FeatureStore:
        settings = self.settings
        extractor = FeatureExtractor(
            settings.features,
            settings.weights,
            inception_input=inception_input,
            batch_size=settings.batch_size,
            sharding=batch_sharding(make_mesh(MeshConfig(), jax.local_devices())),
        )
        return FeatureStore(self.directory, extractor, settings.weights)

    def _fit_classifier(self) -> Classifier:
        train = SplitImages(self.data, "train")
        logging.info("Fitting the classifier to %d real images", len(train))
        return Classifier(read_all(train), train.labels())

    def of_images(self) -> Metrics:
        """Evaluate the images that the config names.

        Raises:
            ValueError: they cannot be read, or are of another size than the reference's.

        Returns:
            the figures, and how many images there are.
        """
        images = open_images(self.settings.images)
        return {**below("generation", self._compare(images)), "num_images": len(images)}

    def load(self, path: str) -> Subject:
        """Load a model directory.

        Raises:
            ValueError: it cannot be read, or is not of the kind that the evaluators need.
        """
        opened = open_model(path)
        kind, texts = opened.kind, takes_texts(opened.architecture)
        if self.settings.generates and texts and not self.sampling.prompts:
            lines = [" ".join(text.split()) for text in SplitImages(self.data, "test").captions()]
            self.sampling = dataclasses.replace(self.sampling, prompts="\n".join([*lines, ""]))
        if self.settings.generates:
            for scale in (None, *self.settings.guidance_scales):
                sampling = self.with_scale(scale)
                check(sampling, path, "use --config.evaluate.evaluators=reconstruction")
        for name in ("clip", "attributes"):
            if getattr(self, name) is not None and not texts:
                raise ValueError(f"config.evaluate.{name} judges prompts, but {path} draws classes")
        if self.classifier is not None and self.settings.generates and texts:
            raise ValueError("evaluate.classifier judges classes, no captions: set it to False")
        if LIKELIHOOD in self.settings.names and not kind.has_likelihood:
            raise ValueError(
                f"{path} holds {kind.noun}, which has no likelihood: leave {LIKELIHOOD!r} out of "
                "--config.evaluate.evaluators"
            )
        pipeline = self._load_model(path)
        subject = Subject(pipeline, path, model_dir.fingerprint(model_dir.locate(path)))
        if not {"reconstruction", LIKELIHOOD}.isdisjoint(self.settings.names):
            subject.autoencoder.check_image_size(self.data.image_size)
        return subject

    def with_scale(self, guidance_scale: tuple[float, ...] | None) -> SampleConfig:
        """How images are drawn with another guidance scale; None: with that of the config."""
        if guidance_scale is None:
            return self.sampling
        options = {**self.sampling.options, "guidance_scale": guidance_scale}
        return dataclasses.replace(self.sampling, options=options)

    def made_with(self, subject: Subject) -> dict[str, Any]:
        """What the metrics depend on, for the record."""
        settings = {"seed": self.sampling.seed, "model": subject.fingerprint}
        if self.settings.generates:
            options = self.sampling.sampling(subject.generator.sampling)
            settings = {"num_generated": self.settings.num_images, **settings}
        else:
            options = self.sampling.reconstruction(subject.autoencoder.sampling)
        return {**(dataclasses.asdict(options) if options else {}), **settings}

    def forget(self, fingerprint: str) -> None:
        """Delete the images and features of a model, by its fingerprint; process 0 only."""
        if jax.process_index() != 0:
            return
        for manifest in self.directory.glob(f"*/{MANIFEST_NAME}"):
            if fingerprint in manifest.read_text():
                storage.delete_tree(manifest.parent)

    def generated(
        self, subject: Subject, sampling: SampleConfig, *, previews: bool = False
    ) -> GeneratedImages:
        """Make the images of a model that are not there yet."""
        pipeline = subject.generator
        made_with = {**identity(sampling, pipeline, subject.fingerprint), "previews": previews}
        labels = drawn_of(pipeline.prior.config, pipeline.class_names, sampling, most=None)
        path = self.path("images", {**made_with, "labels": labels})
        image_set = ImageSet(path, self.settings.num_images, labels)
        image_set.bind(made_with)
        fill(image_set, pipeline, sampling, previews=previews)
        return GeneratedImages(image_set, {**made_with, "labels": labels})

    def _compare(self, images: Images) -> dict[str, float | int]:
        return {} if self._comparison is None else self._comparison.metrics(images)

    def judge(self, images: GeneratedImages) -> Metrics:
        """Compare generated images with the reference, and with their labels or prompts."""
        metrics = self._compare(images)
        if self.classifier is not None:
            labels = images.pieces.labels_of(0, len(images))
            metrics["accuracy"] = self.classifier.accuracy(read_all(images), labels)
        if self.clip is not None:
            metrics |= self.clip.metrics(images)
        if self.attributes is not None:
            prompts = images.pieces.labels_of(0, len(images)).tolist()
            metrics |= self.attributes.metrics(read_all(images), prompts) | self.attributes.on_real
        return metrics

    def show(self, images: GeneratedImages, subject: Subject) -> None:
        """Write images beside the nearest real ones to `neighbours.png`, if these are there."""
        if self._comparison is None or jax.process_index() != 0:
            return
        names = [class_name(subject.generator, label) for label in images.pieces.labels]
        picture = self._comparison.neighbours(images, names)
        if picture is not None:
            path = self.directory / "neighbours.png"
            with replacing(path) as temporary:
                Image.fromarray(picture).save(temporary)
            logging.info("Wrote %s", path)

    def path(self, name: str, made_with: Mapping[str, Any]) -> storage.Path:
        """Directory of what is made with some settings."""
        return self.directory / f"{name}-{digest(made_with)}"


def below(prefix: str, metrics: Metrics) -> Metrics:
    """Put a prefix before all names.

    Raises:
        ValueError: a metric is NaN. Infinity there is: the PSNR of equal images.
    """
    for name, value in metrics.items():
        numbers = value if isinstance(value, list) else [value]
        if any(np.isnan(number).any() for number in numbers):
            raise ValueError(f"{prefix}/{name} is {value}: nothing can be said of these images")
    return {f"{prefix}/{name}": value for name, value in metrics.items()}
