"""The KL autoencoder: images to Gaussians over latents, latents to images."""

import functools

import jax
import numpy as np

from dar_jax.common.checks import check_microbatch, check_shape
from dar_jax.common.image import as_image
from dar_jax.common.typing import Any, Array, Float, Params, PRNGKeyArray, Shaped
from dar_jax.models.kl_vae import KlVae, KlVaeConfig, posterior
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.pipelines.base import Autoencoder, Reconstruction


class KlVaePipeline(Autoencoder[KlVae]):
    """Images to moments, latents to images."""

    config: KlVaeConfig

    def encode(self, images: Shaped[Array | np.ndarray, "B H W 3"]) -> Float[Array, "B h w C2"]:
        """Encode images in [-1, 1], or uint8 pixels, to moments.

        `models.kl_vae.posterior` makes a Gaussian of them.

        In float32, whatever decoding is in.

        Raises:
            ValueError: another shape, sides that the stride does not divide, or a batch that does
                not divide over the mesh.
        """
        check_shape("images", images, ("B", "H", "W", 3))
        images = as_image("images", images)
        return _encode(self.model, self.params, self.put(images))

    def decode(
        self, latents: Float[Array | np.ndarray, "B h w C"], *, microbatch: int | None = None
    ) -> Float[Array, "B H W 3"]:
        """Decode latents to images, nominally in [-1, 1] (not clipped).

        Args:
            latents: samples of posteriors; what a flow has made, divided by `config.latent_scale`.
            microbatch: images decoded at a time, a divisor of B: bounds memory.

        Raises:
            ValueError: another shape, or a batch that does not divide over the mesh.
        """
        check_shape("latents", latents, ("B", "h", "w", self.config.latent_channels))
        microbatch = check_microbatch(microbatch, len(latents))
        return _decode(self.model, self.params, self.put(latents), microbatch=microbatch)

    def reconstruct(
        self,
        images: Shaped[Array | np.ndarray, "B H W 3"],
        *,
        rng: PRNGKeyArray | int,
        first_index: int = 0,
        sampling: Any = None,
    ) -> Reconstruction:
        """Decode the posteriors' means: nothing is drawn."""
        del rng, first_index, sampling
        return Reconstruction(self.decode(posterior(self.encode(images)).mean), None)


@functools.partial(jax.jit, static_argnames="model")
def _encode(model: FunctionalModel[KlVae], params: Params, images: Array) -> Array:
    with model.in_float32(params) as vae:
        return vae.encode(images)


@functools.partial(jax.jit, static_argnames=("model", "microbatch"))
def _decode(
    model: FunctionalModel[KlVae], params: Params, latents: Array, *, microbatch: int | None
) -> Array:
    with model.decoding(params) as vae:
        return vae.decode(latents, microbatch=microbatch)
