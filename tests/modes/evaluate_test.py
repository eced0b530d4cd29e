"""`--mode=evaluate`: what is measured, that it resumes, and that batches change nothing."""

import functools
import json
import re

import numpy as np
import pytest
from PIL import Image

from configs import common
from dar_jax.common.image import to_float, to_pixels
from dar_jax.config import build as read_config
from dar_jax.data.base import DataConfig
from dar_jax.evaluation.config import EvaluateConfig
from dar_jax.evaluation.evaluators import base as evaluators
from dar_jax.evaluation.evaluators.likelihood import calibration
from dar_jax.evaluation.image_sources import SplitImages, read_all
from dar_jax.generation import batches
from dar_jax.generation.resumable_arrays import Pieces
from dar_jax.modes.evaluate import evaluate
from tests import tiny_model, tiny_transdiff
from tests.faults.cheap import BrightnessClassifier
from tests.tiny_model import NUM_CLASSES, SIZE

NUM_IMAGES = 12
ONE_LEVEL = 1  # a compiled program per batch size rounds differently
CLOSE = 0.05  # of figures of images that differ by one level here and there
BASIC = dict(features="", lpips="", classifier=True, num_images=NUM_IMAGES)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model.save(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True, scope="module")
def simple_parts():
    """A model is loaded once, and the classifier needs no fitting."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "from_pretrained", functools.cache(batches.from_pretrained))
        patch.setattr(evaluators, "Classifier", BrightnessClassifier)
        yield


@pytest.fixture
def run(model, tmp_path):
    """Evaluate with these settings; return what `evaluation.json` holds."""

    def run(workdir="run", batch_size=8, path=model, sample=None, **settings):
        config = common.base()
        config.data.update(source="synthetic", image_size=SIZE)
        config.sample.update(model=str(path), batch_size=batch_size, guidance_scale=(2.0,))
        config.sample.update(sample or {})
        config.evaluate.update(BASIC | settings)
        evaluate(read_config(config), str(tmp_path / workdir))
        return json.loads((tmp_path / workdir / "evaluation.json").read_text())

    return run


def pieces(workdir, name):
    (directory,) = (workdir / "evaluation").glob(f"{name}-*")
    return Pieces(directory, NUM_IMAGES)


def test_previews_are_judged_after_every_group(run, tmp_path):
    results = run(evaluators="previews")
    image_set = pieces(tmp_path / "run", "images")
    previews = [image_set.array(name) for name in ("after_1", "arr_0")]
    labels = np.arange(NUM_IMAGES) % NUM_CLASSES
    expected = [BrightnessClassifier().accuracy(pixels, labels) for pixels in previews]
    assert results["generation/accuracy_of_previews"] == pytest.approx(expected)
    assert results["generation/accuracy"] == pytest.approx(expected[-1])
    assert not np.array_equal(*previews)
    assert Image.open(tmp_path / "run/evaluation/previews.png").width > 100


def test_images_are_those_that_sampling_draws(run, model, tmp_path):
    run(evaluators="previews")
    config = common.base()
    config.sample.update(model=str(model), batch_size=8, guidance_scale=(2.0,))
    config = read_config(config)
    settings = config.sample
    pipeline = batches.load(settings, "", compute=config.compute, mesh=config.mesh)
    labels = np.arange(NUM_IMAGES, dtype=np.int32) % NUM_CLASSES
    made = list(batches.generate(pipeline, labels, settings))
    drawn = np.concatenate([batch.previews for batch in made], axis=1)
    image_set = pieces(tmp_path / "run", "images")
    for name, pixels in zip(("after_1", "arr_0"), drawn, strict=True):
        np.testing.assert_array_equal(image_set.array(name), pixels)


def test_tokenizer_alone_is_judged_by_its_reconstructions(run, model, tmp_path):
    path = model.parent / "dar_tokenizer"
    results = run(evaluators="reconstruction", path=path)
    made = pieces(tmp_path / "run", "reconstructions")
    data = DataConfig(source="synthetic", image_size=SIZE)
    originals = read_all(SplitImages(data, "test", NUM_IMAGES))
    mse = ((made.array("arr_0") - originals.astype(float)) ** 2).mean(axis=(1, 2, 3))
    expected = np.mean(10 * np.log10(255**2 / mse))
    assert results["reconstruction/psnr_db"] == pytest.approx(expected)
    counts = np.bincount(made.array("indices").ravel(), minlength=32)
    assert results["reconstruction/codebook_usage"] == np.mean(counts > 0)
    used = counts[counts > 0] / counts.sum()
    perplexity = np.exp(-np.sum(used * np.log(used)))
    assert results["reconstruction/codebook_perplexity"] == pytest.approx(perplexity)
    assert results["reconstruction/num_images"] == NUM_IMAGES
    assert {"model", "solver", "seed", "version", "revision"} <= set(results)
    assert len(results["model"]) == 64


def test_solver_of_the_config_draws_reconstructions_and_generated_images(run, tmp_path):
    solvers = ("adams_bashforth2", "euler")
    for solver in solvers:
        sample = {"solver": solver}
        results = run(solver, evaluators="reconstruction,generation", sample=sample)
        assert results["solver"] == solver
    for name in ("images", "reconstructions"):
        made = [pieces(tmp_path / solver, name) for solver in solvers]
        np.testing.assert_array_equal(*(part.array("indices") for part in made))
        image, other = (part.array("arr_0").astype(int) for part in made)
        assert np.abs(image - other).max() > ONE_LEVEL


def test_guidance_is_swept(run, tmp_path):
    results = run(evaluators="guidance", guidance_scales=((1.0,), (1.0, 3.0)))
    assert results["guidance/scales"] == [[1.0], [1.0, 3.0]]
    assert len(results["guidance/accuracy"]) == 2
    manifests = (tmp_path / "run").glob("evaluation/images-*/manifest.json")
    scales = sorted(json.loads(path.read_text())["guidance_scale"] for path in manifests)
    assert scales == [[1.0], [1.0, 3.0]]
    assert Image.open(tmp_path / "run/evaluation/guidance.png").width > 100


def test_likelihood_of_held_out_images(run, model, tmp_path):
    results = run(evaluators="likelihood", classifier=False)
    pipeline = batches.from_pretrained(model)
    found = {}
    for split in ("test", "train"):
        pictures = SplitImages(DataConfig(source="synthetic", image_size=SIZE), split, NUM_IMAGES)
        images, labels = to_float(read_all(pictures)), pictures.labels().astype(np.int32)
        found[split] = pipeline.log_likelihood(images, labels)
        if split == "test":
            right = np.asarray(pipeline.classify(images)).argmax(axis=1) == labels
    nats = -np.asarray(found["test"].tokens)
    assert results["likelihood/nats_per_image"] == pytest.approx(nats.sum() / NUM_IMAGES)
    assert results["likelihood/nats_of_groups"] == pytest.approx(
        nats.reshape(NUM_IMAGES, 2, -1).sum(axis=2).mean(axis=0)
    )
    assert results["likelihood/bits_per_pixel"] == pytest.approx(
        nats.sum() / NUM_IMAGES / np.log(2) / SIZE**2
    )
    assert results["likelihood/deviation_from_train"] == pytest.approx(
        float(found["test"].deviation_from(found["train"]).mean()), abs=1e-4
    )
    assert results["likelihood/accuracy"] == np.mean(right)
    for name in ("surprise", "calibration"):
        assert Image.open(tmp_path / f"run/evaluation/{name}.png").width > 100


def test_calibration_compares_posteriors_with_how_often_they_are_right():
    posterior = np.repeat([0.9, 0.6], 10)
    scores = np.log(np.stack([posterior, 1 - posterior], axis=1)) - 50.0  # codes are unlikely
    labels = np.array([0] * 9 + [1] + [0] * 2 + [1] * 8)
    found = calibration(scores, labels)
    assert found["accuracy"] == 11 / 20
    assert found["calibration_confidence"] == pytest.approx([0.6] * 5 + [0.9] * 5)
    assert np.mean(found["calibration_accuracy"][:5]) == pytest.approx(0.2)
    few = calibration(scores[:3], labels[:3])
    assert few["calibration_error"] == pytest.approx(0.1)  # always right, and 90 % sure


@pytest.mark.slow
def test_model_of_latents_is_judged_like_one_of_tokens(run, tmp_path):
    tiny_transdiff.save_vae(tmp_path)
    path = tiny_transdiff.save(tmp_path, "model", tiny_transdiff.ONE_STEP)
    options = dict(num_steps=8, solver="euler_maruyama", noise_scale=0.9)
    evaluators = dict(evaluators="reconstruction,previews,guidance", guidance_scales=((1.0,),))
    results = run(path=path, sample=options, num_images=4, **evaluators)
    with pytest.raises(ValueError, match="holds a model of latents, which has no likelihood"):
        run("none", evaluators="likelihood", path=path)
    assert {name: results[name] for name in options} == options
    assert "reconstruction/psnr_db" in results and "reconstruction/codebook_usage" not in results
    assert len(results["generation/accuracy_of_previews"]) == 4
    assert len(results["guidance/accuracy"]) == 1
    drawn = {}
    for directory in (tmp_path / "run/evaluation").glob("images-*"):
        (piece,) = directory.glob("0*.npz")
        scale = json.loads((directory / "manifest.json").read_text())["guidance_scale"]
        drawn[tuple(scale)] = dict(np.load(piece))
    guided, plain = drawn[2.0,], drawn[1.0,]
    assert guided.keys() - plain.keys() == {"after_1", "after_2", "after_3"}
    # What is kept beside the images is what they are made of.
    vae = batches.from_pretrained(path).vae
    for part in (guided, plain):
        images = vae.decode(part["latents"] / vae.config.latent_scale)
        pixels = to_pixels(np.clip(images, -1, 1))
        np.testing.assert_allclose(part["arr_0"].astype(int), pixels, atol=ONE_LEVEL)
    assert np.any(guided["arr_0"] != plain["arr_0"])


def test_killed_evaluation_goes_on_with_another_batch_size(run, tmp_path, monkeypatch):
    evaluators = "reconstruction,generation"
    expected = run("whole", evaluators=evaluators)
    save = Pieces.save
    for pieces_left in ([1], [3]):  # in the reconstructions, then in the images

        def save_or_die(self, first, arrays, left=pieces_left):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            save(self, first, arrays)

        with monkeypatch.context() as patch:
            patch.setattr(Pieces, "save", save_or_die)
            with pytest.raises(KeyboardInterrupt):
                run(evaluators=evaluators)
    results = run(evaluators=evaluators, batch_size=16)
    for name in ("images", "reconstructions"):
        ours, whole = (pieces(tmp_path / part, name) for part in ("run", "whole"))
        np.testing.assert_array_equal(ours.array("indices"), whole.array("indices"))
        images = [part.array("arr_0").astype(int) for part in (ours, whole)]
        np.testing.assert_allclose(*images, atol=ONE_LEVEL)
    numbers = {name: v for name, v in expected.items() if name.startswith("reconstruction/")}
    assert {name: results[name] for name in numbers} == pytest.approx(numbers, rel=CLOSE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(evaluators="dance"), "evaluators='dance' must be some of"),
        (dict(evaluators="guidance"), "evaluators=guidance and guidance_scales need each other"),
        (dict(guidance_scales=((1.0,),)), "evaluators=guidance and guidance_scales need"),
        (dict(classifier=False), "features='' leaves nothing to measure"),
        (dict(images="a.npz", evaluators="previews"), "needs evaluators='generation'"),
        (dict(images="a.npz"), "leaves nothing to measure"),
        (dict(num_images=0), "num_images=0 must be at least 1"),
        (dict(features="resnet"), "features='resnet' must be one of"),
        (dict(lpips="alex"), "lpips='alex' must be one of vgg16, alexnet or empty"),
        (dict(features="inception"), "--config.convert.net=inception"),
        (dict(evaluators="generation", path="{model}/../dar_tokenizer"), "draws no images: use"),
        (
            dict(evaluators="likelihood", path="{model}/../dar_tokenizer"),
            "has no likelihood: leave",
        ),
        (dict(path="{model}/none"), "is not a readable model directory"),
    ],
)
def test_mistake_is_one_line_and_writes_nothing(run, model, tmp_path, settings, message):
    if "path" in settings:
        settings = settings | {"path": settings["path"].format(model=model)}
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        run(**settings)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_way_into_inception_needs_inception():
    with pytest.raises(ValueError, match=r"='pytorch_fid' needs features='inception', not 'vgg16'"):
        EvaluateConfig(features="vgg16", inception_input="pytorch_fid")
    with pytest.raises(ValueError, match="='clean' must be one of tensorflow, pytorch_fid or"):
        EvaluateConfig(inception_input="clean")


def test_evaluators_are_split_at_commas():
    config = EvaluateConfig(evaluators="reconstruction, previews")
    assert config.names == ("reconstruction", "previews") and config.generates
    assert not EvaluateConfig(evaluators="reconstruction,likelihood").generates
