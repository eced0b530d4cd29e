"""Training TransDiff in the latent space of a frozen KL-VAE (arXiv:2506.09482).

Follows `forward` of the reference's `models/transdiff.py` and `models/transdiff_mrar.py`.

moments = vae.encode(image)                        or cached ones
latent = latent_scale * sample of the posterior    drawn anew every time
label -> null class with probability label_dropout
z = condition(label, latents of the images before)          once per class label
s, noise ~ N(0, I);  t = logit_normal_times(s)              `copies` times per image
x_t = t latent + (1 - t) noise
loss = mean((velocity(x_t, t, z) - (latent - noise))^2) + diversity_weight * diversity(z)

The diversity is that of z before the positions are added to it.

With references (MRAR) a sample is four images of one class; image k is conditioned on the k images
before it, and the loss is the mean of all four. The encoder runs once for all of them, the decoder
sees every image with the first tokens of z only.

The copies of an image lie side by side in the batch, where the reference repeats the whole batch:
the same mean, and a batch split over devices stays split. The reference casts the model to bfloat16
in some recipes, average and optimizer included; here parameters are float32 in any case.

A run that starts from another model of the family (`train.init_from`) takes every tensor that has
the same shape. The one mask token becomes the first value of all of them, and the positions of the
decoder are interpolated to the larger latent. All else is drawn anew, such as the projection of
references, which a one-step model does not train.
"""

import dataclasses
import math
from collections.abc import Mapping

import einops
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

from dar_jax.common import image as images
from dar_jax.common.image import bicubic_matrix
from dar_jax.common.typing import Array, Float, Params, PRNGKeyArray
from dar_jax.flow.path import interpolate, velocity
from dar_jax.flow.times import logit_normal_times
from dar_jax.models.kl_vae import posterior
from dar_jax.models.transdiff import sampler
from dar_jax.models.transdiff.model import TransDiff, TransDiffConfig
from dar_jax.models.transdiff.options import TransDiffSampling
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.tasks.base import (
    AbstractBatch,
    Adapter,
    FrozenModel,
    ModelTask,
    Panel,
    average,
    label_shape,
    picture_batch,
)
from dar_jax.tasks.time_groups import group_average, group_sums

NUM_LEVELS = 1000
"""Noise levels of the reference, whose times are integers."""
NUM_PICTURES = 10
PICTURE_STEPS = 25
PICTURE_GUIDANCE = 2.0


@dataclasses.dataclass(frozen=True)
class TransDiffLossConfig:
    """Defaults are those of the one-step recipes.

    Attributes:
        copies: noisy copies of every image in a step (`diffusion_batch_mul`).
        num_levels: times are quantised to so many levels; 0 leaves them continuous.
        diversity_weight: of `diversity`; the reference has the term, and never turns it on.
    """

    copies: int = 4
    num_levels: int = NUM_LEVELS
    diversity_weight: float = 0.0

    def __post_init__(self):
        if self.copies < 1:
            raise ValueError(f"copies={self.copies} must be at least 1")
        if self.num_levels < 0:
            raise ValueError(f"num_levels={self.num_levels} is negative; 0 is continuous")


def image_losses(
    model: TransDiff,
    condition: Float[Array, "B M D"],
    latents: Float[Array, "B images h w C"],
    normals: Float[Array, "B images copies"],
    noise: Float[Array, "B images copies h w C"],
    *,
    num_levels: int | None,
    rng: PRNGKeyArray | None = None,
) -> Float[Array, "B images copies"]:
    """Flow loss of every noisy copy with given draws.

    Args:
        model: the bound model.
        condition: of all images.
        latents: data.
        normals: standard normal, of the times.
        noise: standard normal.
        num_levels: see `flow.times.logit_normal_times`.
        rng: turns dropout on.
    """
    copies = normals.shape[-1]
    data = einops.repeat(latents, "b k h w c -> (b k copies) h w c", copies=copies)
    noise = einops.rearrange(noise, "b k copies h w c -> (b k copies) h w c")
    t = logit_normal_times(normals, num_levels).reshape(-1)
    x_t = interpolate(data, noise, t)
    mask = None if latents.shape[1] == 1 else model.prefix_mask(copies)
    caches = model.decoder.keys_values(condition)
    predicted = model.decoder.velocity(x_t, t, caches, mask, rng=rng)
    error = predicted - velocity(data, noise)
    return jnp.mean(error**2, axis=(1, 2, 3)).reshape(normals.shape)


def diversity(condition: Float[Array, "B M D"]) -> Float[Array, ""]:
    """Mean cosine of all pairs of condition tokens of an image, averaged over the batch.

    A token and itself are a pair too, as in the reference.
    """
    tokens = condition.astype(jnp.float32)
    tokens /= jnp.linalg.norm(tokens, axis=-1, keepdims=True)
    return jnp.mean(jnp.square(jnp.mean(tokens, axis=1)).sum(axis=-1))


class TransDiffTask(ModelTask):
    """See the module's docstring."""

    def __init__(
        self,
        config: TransDiffConfig,
        loss_config: TransDiffLossConfig,
        vae: FrozenModel,
        compute: Compute,
        *,
        image_size: int,
        from_moments: bool = False,
    ):
        """Build the task.

        Args:
            config: the architecture.
            loss_config: of the loss.
            vae: the frozen autoencoder.
            compute: execution choices of the model that is trained.
            image_size: side of the images.
            from_moments: batches hold cached moments: the autoencoder only makes pictures.

        Raises:
            ValueError: latents of such images are of another size than the model's.
        """
        self.model = FunctionalModel(TransDiff, config, compute)
        self.loss_config = loss_config
        self.vae, self._vae_params = vae
        sampler.check_image_size(config, self.vae.config, image_size)
        self._image_size = image_size
        self._from_moments = from_moments

    def frozen(self) -> Params:
        return {"vae": self._vae_params}

    def abstract_frozen(self) -> Params:
        return {"vae": self.vae.abstract_params()}

    def abstract_batch(self, batch_size: int) -> AbstractBatch:
        config = self.model.config
        if not self._from_moments:
            return picture_batch(batch_size, self._image_size, config.num_references)
        group = () if config.num_references == 1 else (config.num_references,)
        shape = (batch_size, *group, *(config.latent_size,) * 2, 2 * config.channels)
        moments = jax.ShapeDtypeStruct(shape, jnp.float32)
        return {"moments": moments, "label": label_shape(batch_size)}

    def loss(
        self, params: Params, batch: Mapping[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> tuple[Array, dict[str, Array]]:
        rng_posterior, rng_label, rng_flow, rng_encoder, rng_decoder = jax.random.split(rng, 5)
        latents = self.latents(batch, rng_posterior, frozen)
        model, config = self.model.bind(params), self.loss_config
        draws = jax.random.uniform(rng_label, batch["label"].shape)
        labels = model.drop_labels(batch["label"], draws)
        tokens = model.encoder(labels, latents[:, :-1], rng=rng_encoder)

        shape = (*latents.shape[:2], config.copies)
        rng_times, rng_noise = jax.random.split(rng_flow)
        losses = image_losses(
            model,
            model.encoder.place(tokens),
            latents,
            jax.random.normal(rng_times, shape),
            jax.random.normal(rng_noise, (*shape, *latents.shape[2:])),
            num_levels=config.num_levels or None,
            rng=rng_decoder,
        )
        terms = {"flow_loss": jnp.mean(losses)}
        loss = terms["flow_loss"]
        if config.diversity_weight:
            terms["diversity_loss"] = diversity(tokens)
            loss += config.diversity_weight * terms["diversity_loss"]
        return loss, {**terms, **self._by_image(losses)}

    def latents(
        self, batch: Mapping[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> Float[Array, "B images h w C"]:
        """Draw the scaled latents of a batch of pixels or moments, of one or several images."""
        name = "moments" if "moments" in batch else "pixels"
        values = batch[name]
        if values.ndim == 4:
            values = values[:, None]
        _check_images(name, values.shape[1], self.model.config)
        flat = einops.rearrange(values, "b k ... -> (b k) ...")
        if name == "pixels":
            with self.vae.in_float32(frozen["vae"]) as vae:
                flat = vae.encode(images.to_float(flat))
        gaussian = posterior(flat)
        latents = self.vae.config.latent_scale * gaussian.sample(
            jax.random.normal(rng, gaussian.mean.shape)
        )
        return jax.lax.stop_gradient(
            einops.rearrange(latents, "(b k) ... -> b k ...", b=len(values))
        )

    def _by_image(self, losses: Float[Array, "B images copies"]) -> dict[str, Array]:
        """Sums of the losses of each of several images."""
        num_images = losses.shape[1]
        if num_images == 1:
            return {}
        image = jnp.broadcast_to(jnp.arange(num_images)[:, None], losses.shape)
        return {"group_sums": group_sums(losses.reshape(-1), image.reshape(-1), num_images)}

    def metrics(self) -> dict[str, type[metrics.Metric]]:
        names = ["flow_loss", *(["diversity_loss"] if self.loss_config.diversity_weight else [])]
        num_images = self.model.config.num_references
        by_image = range(num_images) if num_images > 1 else ()
        return {
            **{name: average(name) for name in names},
            **{f"flow_loss_{number + 1}": group_average(number) for number in by_image},
        }

    def pictures(
        self, params: Params, batch: Mapping[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> dict[str, Panel]:
        """Rows: samples of the first classes; columns: what each pass ends with."""
        del batch
        config = self.model.config
        labels = jnp.arange(NUM_PICTURES) % config.num_classes
        rngs = jax.random.split(rng, len(labels))
        solver = TransDiffSampling(num_steps=PICTURE_STEPS, guidance_scale=(PICTURE_GUIDANCE,))
        noise = sampler.initial_noise(rngs, config)
        passes = sampler.run(self.model, params, labels, noise, rngs, solver)
        decoded = (sampler.decode(self.vae, frozen["vae"], each.latents) for each in passes)
        cells = np.stack([images.to_pixels(image) for image in decoded], axis=1)
        header = [f"image {number}" for number in range(1, cells.shape[1] + 1)]
        return {"samples": Panel(cells, labels.tolist(), header)}

    def adapters(self) -> dict[str, Adapter]:
        return {
            "encoder/mask_token": repeat_rows,
            "decoder/position_table": interpolate_positions,
        }


def repeat_rows(rows: Float[np.ndarray, "N D"], shape: tuple[int, ...]) -> Float[np.ndarray, "M D"]:
    """Let every one of more mask tokens start from the same vector."""
    return np.repeat(rows, max(1, shape[0] // len(rows)), axis=0)


def interpolate_positions(
    table: Float[np.ndarray, "N D"], shape: tuple[int, ...]
) -> Float[np.ndarray, "M D"]:
    """Interpolate position embeddings of a square of tokens to a larger square, bicubically."""
    old, new = math.isqrt(len(table)), math.isqrt(shape[0])
    matrix = bicubic_matrix(old, new).astype(table.dtype)
    grid = einops.rearrange(table, "(h w) d -> h w d", h=old)
    return einops.rearrange(np.einsum("yh,xw,hwd->yxd", matrix, matrix, grid), "y x d -> (y x) d")


def _check_images(name: str, found: int, config: TransDiffConfig) -> None:
    if found != config.num_references:
        raise ValueError(
            f"a sample of the data has {found} {name}, but config.model.num_references="
            f"{config.num_references} takes as many: set config.data.num_references to that"
        )
