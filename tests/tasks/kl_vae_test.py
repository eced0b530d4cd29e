"""Training the KL autoencoder: its loss, what it looks at."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.common import image as images
from dar_jax.models.frozen.lpips import Lpips, LpipsConfig, StageConfig
from dar_jax.models.kl_vae import KlVae, KlVaeConfig, posterior
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.tasks.base import Task
from dar_jax.tasks.kl_vae import KlVaeLossConfig, KlVaeTask
from tests.random_params import random_params

CONFIG = KlVaeConfig(
    width=8,
    width_factors=(1, 2),
    num_blocks=1,
    attention_levels=(1,),
    latent_channels=2,
    num_groups=4,
)
SIZE, BATCH = 8, 3
SMALL_LPIPS = FunctionalModel(Lpips, LpipsConfig((StageConfig((4,)), StageConfig((6,), pool=2))))
RTOL = 1e-5
"""Sums in another order."""
LPIPS_RTOL = 1e-4
"""LPIPS is made of differences of nearly equal features."""


def make_task(compute=None, **weights):
    loss = KlVaeLossConfig(**{"perceptual_weight": 0.0, **weights})
    task = KlVaeTask(CONFIG, loss, compute or Compute(), image_size=SIZE)
    if loss.perceptual_weight:
        task.nets.lpips = SMALL_LPIPS
    return task


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), dtype=np.uint8)
    return {"pixels": jnp.asarray(pixels), "label": jnp.zeros(BATCH, jnp.int32)}


@pytest.fixture(scope="module")
def params():
    return FunctionalModel(KlVae, CONFIG).init(jax.random.key(0))


def test_loss_is_that_of_the_sampled_latents(params, batch):
    task = make_task(kl_weight=0.25, perceptual_weight=0.5)
    assert isinstance(task, Task)
    frozen = {"lpips": jax.device_put(random_params(SMALL_LPIPS.abstract_params()))}
    rng = jax.random.key(2)
    loss, out = jax.jit(task.loss)(params, batch, rng, frozen)

    @jax.jit
    def expected(params, pixels):
        vae, image = task.model.bind(params), images.to_float(pixels)
        gaussian = posterior(vae.encode(image))
        sample = gaussian.sample(jax.random.normal(rng, gaussian.mean.shape))
        reconstruction = vae.decode(sample)
        variance = gaussian.std() ** 2
        kl = 0.5 * jnp.sum(gaussian.mean**2 + variance - 1 - jnp.log(variance)) / image.size
        distance = task.nets.perceptual(frozen, image, reconstruction)
        return jnp.mean(jnp.abs(reconstruction - image)), kl, jnp.std(sample), distance

    l1, kl, std, distance = expected(params, batch["pixels"])
    found = [out[name] for name in ("reconstruction_loss", "kl_loss", "latent_std")]
    np.testing.assert_allclose(found, [l1, kl, std], rtol=RTOL)
    np.testing.assert_allclose(out["perceptual_loss"], distance, rtol=LPIPS_RTOL)
    assert min(l1, kl, distance) > 1e-3
    np.testing.assert_allclose(loss, l1 + 0.25 * kl + 0.5 * out["perceptual_loss"], rtol=RTOL)
    assert set(task.metrics()) == set(out)


@pytest.mark.slow
def test_rematerialisation_changes_no_gradient(params, batch):
    gradients = [
        jax.jit(jax.grad(lambda p, task=task: task.loss(p, batch, jax.random.key(1), {})[0]))(
            params
        )
        for task in (make_task(Compute(remat=remat)) for remat in ("none", "blocks"))
    ]
    plain, remat = (
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(jax.device_get(gradient))])
        for gradient in gradients
    )
    assert np.linalg.norm(plain) > 0.1
    assert np.linalg.norm(plain - remat) <= RTOL * np.linalg.norm(plain)


def test_pictures_and_metrics_show_the_reconstruction(params, batch):
    task = make_task()
    panel = task.pictures(params, batch, jax.random.key(0), {})["reconstruction"]
    assert panel.cells.dtype == np.uint8
    assert panel.cells.shape == (len(panel.labels), 2, SIZE, SIZE, 3)
    np.testing.assert_array_equal(panel.cells[0, 0], batch["pixels"][0])

    @jax.jit
    def reconstruct(params, pixels):
        vae = task.model.bind(params)
        return images.to_pixels(vae.decode(vae.encode(images.to_float(pixels))[..., :2]))

    shown = panel.cells[0, 1].astype(int)
    assert np.abs(shown - reconstruct(params, batch["pixels"])[0]).max() <= 1  # rounding
    assert 0 < task.held_out_metrics(params, batch, jax.random.key(0), {})["psnr_db"] < 60


def test_image_size_that_the_stride_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="9x9 pixels: both sides must be multiples of .* stride 2"):
        KlVaeTask(CONFIG, KlVaeLossConfig(), Compute(), image_size=9)


def test_negative_weight_is_refused():
    with pytest.raises(ValueError, match="kl_weight=-1.0 must not be negative"):
        KlVaeLossConfig(kl_weight=-1.0)
