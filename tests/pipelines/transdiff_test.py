"""The Python API and the command line of TransDiff: streams, previews, meshes, bad input."""

import functools
import re

import jax
import numpy as np
import pytest

from configs import common, mnist
from dar_jax.common import model_dir
from dar_jax.config import build as read_config
from dar_jax.generation import batches
from dar_jax.kinds.loading import from_pretrained
from dar_jax.modes.sample import sample
from dar_jax.parallel import sharding
from dar_jax.parallel.sharding import MeshConfig
from dar_jax.pipelines.base import Pipeline
from dar_jax.pipelines.dar import DarPipeline
from dar_jax.pipelines.transdiff import TransDiffPipeline
from tests import tiny_transdiff
from tests.tiny_transdiff import MRAR, ONE_STEP, VAE

KINDS = {"one_step": ONE_STEP, "mrar": MRAR}
LABELS = (2, 0, 1, 1, 0, 2, 0, 1)
OPTIONS = dict(num_steps=4, guidance_scale=1.5, noise_scale=0.9)
ROUNDING = 1e-4  # another partition sums in another order; images are in -1 .. 1


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Holds the model directories `one_step` and `mrar` of random weights."""
    path = tmp_path_factory.mktemp("models")
    tiny_transdiff.save_vae(path)
    for name, config in KINDS.items():
        tiny_transdiff.save(path, name, config)
    return path


@pytest.fixture(scope="module")
def load(directory):
    return functools.cache(lambda name: from_pretrained(directory / name))


def test_model_directory_holds_its_autoencoder(load):
    pipeline = load("mrar")
    assert isinstance(pipeline, TransDiffPipeline) and isinstance(pipeline, Pipeline)
    assert (pipeline.num_classes, pipeline.image_size) == (3, 8)
    assert pipeline.class_names == ("cat", "dog", "fox")


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        pytest.param("one_step", [1, 2, 3, 4], marks=pytest.mark.slow),
        ("mrar", [4, 8, 12, 16]),
    ],
)
def test_stream_ends_with_what_generate_returns(load, name, steps):
    pipeline = load(name)
    previews = list(pipeline.stream(LABELS[:2], rng=jax.random.key(0), **OPTIONS))
    assert [preview.step for preview in previews] == steps
    for preview in previews:
        assert preview.images.shape == (2, 8, 8, 3) and np.abs(preview.images).max() <= 1
    images, latents = pipeline.generate(LABELS[:2], rng=jax.random.key(0), **OPTIONS)
    np.testing.assert_allclose(images, previews[-1].images, atol=ROUNDING)
    np.testing.assert_allclose(latents, previews[-1].latents, rtol=1e-3, atol=ROUNDING)
    decoded = pipeline.vae.decode(latents / VAE.latent_scale)
    np.testing.assert_allclose(images, np.clip(decoded, -1, 1), atol=ROUNDING)
    assert np.abs(previews[0].images - images).max() > 0.01


def test_an_image_depends_on_its_index_and_label_only(load):
    pipeline = load("mrar")
    options = dict(rng=jax.random.key(3), **OPTIONS)
    whole = pipeline.generate(LABELS[:4], **options).images
    part = pipeline.generate(LABELS[2:4], first_index=2, **options).images
    np.testing.assert_allclose(part, whole[2:4], atol=ROUNDING)
    other = pipeline.generate(LABELS[2:4], **options).images
    assert np.abs(other - part).max() > 0.01


@pytest.mark.slow
def test_eight_devices_draw_what_one_draws(load, directory):
    mesh = sharding.make_mesh(MeshConfig(data=4, fsdp=2))
    split = from_pretrained(directory / "mrar", mesh=mesh)
    options = dict(rng=jax.random.key(0), **OPTIONS)
    images = split.generate(LABELS, **options).images
    assert len(images.sharding.device_set) == 8
    np.testing.assert_allclose(images, load("mrar").generate(LABELS, **options).images, atol=1e-3)


def test_guidance_per_pass(load):
    pipeline = load("mrar")
    generate = functools.partial(pipeline.generate, LABELS[:1], rng=jax.random.key(0), num_steps=2)
    same = generate(guidance_scale=(1.5,) * 4).images
    np.testing.assert_array_equal(same, generate(guidance_scale=1.5).images)
    assert np.any(same != generate(guidance_scale=(1.0, 1.0, 1.0, 1.5)).images)


def test_solvers_without_noise_need_no_scales(load):
    pipeline = load("one_step")
    for solver in ("euler", "adams_bashforth2"):
        options = dict(rng=jax.random.key(0), num_steps=3, solver=solver)
        assert pipeline.generate(LABELS[:1], **options).images.shape == (1, 8, 8, 3)


def test_samples_need_noise_of_their_shape(load, unchecked):
    latent = load("mrar").prior
    noise = np.zeros((1, 4, 4, 2), np.float32)
    for arguments, message in (
        ({}, "rng is missing"),
        (dict(rng=jax.random.key(0), noise=noise[:, :3]), "noise has shape (1, 3, 4, 2)"),
        (
            dict(noise=noise, step_noise=noise[None, None]),
            "step_noise has shape (1, 1, 1, 4, 4, 2)",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            latent.sample_latents(LABELS[:1], num_steps=3, **arguments)


MISTAKES = {
    "class": (dict(labels=(3,)), "labels: 3 is not a class"),
    "weak guidance": (dict(guidance_scale=(0.5,)), "guidance_scale=(0.5,) must be at least 1"),
    "scales": (dict(guidance_scale=(1.5, 2.0)), "must be one scale or 4, one for each pass"),
    "noise scale": (dict(noise_scale=-0.1), "noise_scale=-0.1 must be in 0..2"),
    "drift scale": (dict(drift_scale=3.0), "drift_scale=3.0 must be in 0..2"),
    "solver": (dict(solver="heun"), "solver='heun' must be one of euler_maruyama, euler"),
    "scales of no use": (dict(solver="euler", noise_scale=0.9), "takes no drift_scale=1.0"),
    "steps": (dict(num_steps=0), "num_steps=0 must be in 1..10000"),
    "times": (dict(guidance_times=(0.8, 0.2)), "guidance_times=(0.8, 0.2) must be"),
    "reward of tokens": (
        dict(search=dict(method="end", num=2)),
        "has no likelihood of tokens: name",
    ),
    "option of D-AR": (dict(top_k=5), "config.sample.top_k=5 is not an option"),
    "prefix": (dict(prefix_image="test:0", num_images=0), "need a model of tokens"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line_before_anything_is_read_or_written(
    directory, tmp_path, name, monkeypatch
):
    settings, message = MISTAKES[name]
    monkeypatch.delattr(batches, "from_pretrained")
    config = mnist.get_config("transdiff")
    config.sample.update(dict(model=str(directory / "mrar"), num_images=2) | settings)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        sample(read_config(config), str(tmp_path / "run"))
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_sample_mode_writes_grid_and_passes(directory, tmp_path):
    config = mnist.get_config("transdiff_mrar")
    config.sample.update(
        model=str(directory / "mrar"), labels=(0, 2), images_per_class=2, num_steps=2, batch_size=8
    )
    sample(read_config(config), str(tmp_path))
    assert (tmp_path / "samples/grid.png").exists() and (tmp_path / "samples/previews.png").exists()
    with np.load(tmp_path / "samples/samples.npz") as arrays:
        assert arrays["latents"].shape == (4, 4, 4, 2)
        assert arrays["images"].shape == (4, 8, 8, 3)


def test_model_without_its_autoencoder_is_refused(directory, tmp_path):
    config, params = model_dir.load_model(directory / "one_step")
    model_dir.save_model(tmp_path / "bare", "transdiff", config["model"], params, {})
    with pytest.raises(ValueError, match=r"without its vae: put the vae's model directory at"):
        from_pretrained(tmp_path / "bare")


def test_options_not_set_are_those_of_the_family(load):
    """A bare config says nothing of a solver, which for D-AR would be another."""
    config = read_config(common.base()).sample
    assert config.sampling(load("one_step").sampling).solver == "euler_maruyama"
    assert config.sampling(DarPipeline.sampling_class()).solver == "adams_bashforth2"
