"""Training the sequential diffusion tokenizer (D-AR section 3; the reference's `VQModel.forward`).

indices, codes = encode(image)                    straight-through vector quantisation
u ~ U(0, 1), noise ~ N(0, I)                      one of each per image
window = condition(codes)[window_start(u)]        the tokens that this time may see
t = shift(u);  x_t = t data + (1 - t) noise       data = data_std * image
flow loss = mean((velocity(x_t, t, window) - (data - noise))^2) / data_std^2
loss = flow + codebook + commitment + entropy_weight * entropy
       + perceptual_weight * LPIPS + alignment_weight * REPA
       + adversarial_weight * (generator + discriminator)      see `tasks.loss_nets`
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

from dar_jax.common import image as images
from dar_jax.common.typing import Array, Float, Params, PRNGKeyArray, UInt8
from dar_jax.flow.path import interpolate, predict_data, velocity
from dar_jax.flow.times import shift_times
from dar_jax.models.dar import sampler
from dar_jax.models.dar.quantizer import (
    Quantized,
    dead_code_rate,
    entropy_loss,
    quantization_losses,
)
from dar_jax.models.dar.tokenizer import (
    Tokenizer,
    TokenizerConfig,
    select_windows,
    window_start,
)
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.tasks.base import (
    DISCRIMINATOR,
    AbstractBatch,
    ModelTask,
    Panel,
    average,
    picture_batch,
)
from dar_jax.tasks.codebook import CodebookPerplexity, CodebookUsage, code_counts
from dar_jax.tasks.loss_nets import LossNets, TokenizerLossConfig, reconstruction_metrics
from dar_jax.tasks.time_groups import group_average, group_sums, time_group

__all__ = ["DarTokenizerTask", "TokenizerLossConfig", "TrainingForward", "training_forward"]

NUM_PICTURES = 8


class TrainingForward(NamedTuple):
    """One training pass: the scalar losses and what further losses compare.

    Attributes:
        flow_loss: float32 scalar, the mean of `sample_flow_loss`.
        sample_flow_loss: float32 [B].
        codebook_loss: float32 scalar.
        commitment_loss: float32 scalar.
        quantized: indices and codes.
        t: shifted times [B].
        x_t: noisy images in data units [B, H, W, 3].
        predicted: the clean images that the velocity points to, in [-1, 1].
        features: alignment features [B, M, F] or None.
    """

    flow_loss: Array
    sample_flow_loss: Array
    codebook_loss: Array
    commitment_loss: Array
    quantized: Quantized
    t: Array
    x_t: Array
    predicted: Array
    features: Array | None


def training_forward(
    tokenizer: Tokenizer,
    image: Float[Array, "B H W 3"],
    u: Float[Array, " B"],
    noise: Float[Array, "B H W 3"],
) -> TrainingForward:
    """Encode, noise and predict with given draws.

    Args:
        tokenizer: the bound model.
        image: in [-1, 1].
        u: unshifted times, uniform in [0, 1).
        noise: standard normal.
    """
    config = tokenizer.config
    data_std = config.decoder.data_std
    quantized = tokenizer.encode(image)
    start = window_start(u, config)
    window = select_windows(tokenizer.condition(quantized.codes), start, config)

    data = image * data_std
    t = shift_times(u, config.decoder.time_shift)
    x_t = interpolate(data, noise, t)
    prediction = tokenizer.velocity(x_t, t, window, with_features=True)
    error = prediction.velocity - velocity(data, noise)
    sample_flow_loss = jnp.mean(error**2, axis=(1, 2, 3)) / data_std**2
    losses = quantization_losses(quantized, start + config.window - 1)
    return TrainingForward(
        flow_loss=jnp.mean(sample_flow_loss),
        sample_flow_loss=sample_flow_loss,
        codebook_loss=losses.codebook,
        commitment_loss=losses.commitment,
        quantized=quantized,
        t=t,
        x_t=x_t,
        predicted=predict_data(x_t, prediction.velocity, t) / data_std,
        features=prediction.features,
    )


class DarTokenizerTask(ModelTask):
    """See the module's docstring."""

    def __init__(self, config: TokenizerConfig, loss_config: TokenizerLossConfig, compute: Compute):
        if loss_config.entropy_weight and not config.codebook_size:
            raise ValueError(
                f"loss.entropy_weight={loss_config.entropy_weight} needs a codebook, but "
                "model.codebook_size is 0"
            )
        self.model = FunctionalModel(Tokenizer, config, compute)
        self.loss_config = loss_config
        self.nets = LossNets(loss_config, config, compute)

    def init(self, rng: PRNGKeyArray) -> Params:
        params = self.model.init(rng)
        if self.nets.discriminator is not None:
            params[DISCRIMINATOR] = self.nets.init_discriminator(jax.random.fold_in(rng, 1))
        return params

    def released(self, params: Params) -> Params:
        return {name: part for name, part in params.items() if name != DISCRIMINATOR}

    def frozen(self) -> Params:
        return self.nets.frozen()

    def files(self) -> dict[str, str]:
        return self.nets.files()

    def abstract_frozen(self) -> Params:
        return self.nets.abstract_frozen()

    def abstract_batch(self, batch_size: int) -> AbstractBatch:
        return picture_batch(batch_size, self.model.config.image_size)

    def loss(
        self, params: Params, batch: Mapping[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> tuple[Array, dict[str, Array]]:
        image = images.to_float(batch["pixels"])
        rng_time, rng_noise = jax.random.split(rng)
        u = jax.random.uniform(rng_time, image.shape[:1])
        noise = jax.random.normal(rng_noise, image.shape)
        tokenizer = self.model.bind(self.released(params))
        out = training_forward(tokenizer, image, u, noise)

        weights, nets, config = self._weights(), self.nets, self.model.config
        terms = {
            "flow_loss": out.flow_loss,
            "codebook_loss": out.codebook_loss,
            "commitment_loss": out.commitment_loss,
        }
        if "entropy_loss" in weights:
            distances = tokenizer.quantizer.distances(out.quantized.z)
            terms["entropy_loss"] = entropy_loss(distances)
        if "perceptual_loss" in weights:
            step = batch["step"] if self.loss_config.perceptual_start else 0
            terms["perceptual_loss"] = nets.perceptual_loss(frozen, image, out.predicted, step)
        if "alignment_loss" in weights:
            terms["alignment_loss"] = nets.alignment(frozen, image, out.features)
        if "generator_loss" in weights:
            started = batch["step"] >= self.loss_config.adversarial_start
            losses = nets.adversarial(params[DISCRIMINATOR], image, out.predicted, out.t)
            terms |= {name: started * term for name, term in losses.items()}
        counts = {}
        if out.quantized.indices is not None:
            counts["code_counts"] = code_counts(out.quantized.indices, config.codebook_size)
        group = time_group(u, config.num_groups)
        weighted = (weights[name] * term for name, term in terms.items())
        return sum(weighted, jnp.zeros(())), {
            **terms,
            "dead_code_rate": dead_code_rate(out.quantized.codes),
            **counts,
            "group_sums": group_sums(out.sample_flow_loss, group, config.num_groups),
        }

    def _weights(self) -> dict[str, float]:
        """Weights of the terms that are computed, by name."""
        config = self.loss_config
        weights = {
            "flow_loss": 1.0,
            "codebook_loss": 1.0,
            "commitment_loss": 1.0,
            "entropy_loss": config.entropy_weight,
            "perceptual_loss": config.perceptual_weight,
            "alignment_loss": config.alignment_weight,
            "generator_loss": config.adversarial_weight,
            "discriminator_loss": config.adversarial_weight,
        }
        return {name: weight for name, weight in weights.items() if weight}

    @property
    def complete_after(self) -> int:
        config = self.loss_config
        terms = [(config.perceptual_weight, config.perceptual_start)]
        terms.append((config.adversarial_weight, config.adversarial_start))
        return max(start if weight else 0 for weight, start in terms)

    @property
    def why_negative(self) -> str:
        weight = self.loss_config.entropy_weight
        if not weight:
            return ""
        lowest = -weight * math.log(self.model.config.codebook_size)
        return (
            f"a part of it, {weight:g} entropy_loss, falls to {lowest:.2g} when all codes are used"
        )

    def metrics(self) -> dict[str, type[metrics.Metric]]:
        averages = [*self._weights(), "dead_code_rate"]
        num_groups = self.model.config.num_groups
        of_codebook = {"codebook_usage": CodebookUsage, "codebook_perplexity": CodebookPerplexity}
        return {
            **{name: average(name) for name in averages},
            **{f"flow_loss_{group + 1}": group_average(group) for group in range(num_groups)},
            **(of_codebook if self.model.config.codebook_size else {}),
        }

    def pictures(
        self, params: Params, batch: Mapping[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> dict[str, Panel]:
        """Rows: an original, its previews after each step, the last one the reconstruction."""
        del frozen
        pixels = jnp.asarray(batch["pixels"][:NUM_PICTURES])
        previews = self._reconstruct(params, pixels, rng)
        header = ["original", *(f"step {step}" for step in range(1, len(previews) + 1))]
        cells = np.concatenate([pixels[None], previews]).swapaxes(0, 1)
        labels = np.asarray(batch["label"][:NUM_PICTURES]).tolist()
        return {"reconstruction": Panel(cells, labels, header)}

    def held_out_metrics(
        self, params: Params, batch: Mapping[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> dict[str, float]:
        """PSNR of reconstructions and, where it is part of the loss, their LPIPS (VGG-16)."""
        pixels = jnp.asarray(batch["pixels"])
        other = self._reconstruct(params, pixels, rng)[-1]
        return reconstruction_metrics(self.nets, frozen, pixels, other)

    def _reconstruct(
        self, params: Params, pixels: UInt8[Array, "B H W 3"], rng: PRNGKeyArray
    ) -> UInt8[Array, "steps B H W 3"]:
        """Previews after each step, not resized; the last one is the reconstruction."""
        image = images.to_float(pixels)
        config = dataclasses.replace(self.model.config, output_size=0)
        model = dataclasses.replace(self.model, config=config)
        return images.to_pixels(_previews(model, self.released(params), image, rng))


@functools.partial(jax.jit, static_argnames="model")
def _previews(
    model: FunctionalModel[Tokenizer], params: Params, image: Array, rng: PRNGKeyArray
) -> Float[Array, "steps B H W 3"]:
    tokens = model.bind(params).encode(image).tokens
    noise = jax.random.normal(rng, image.shape)
    return sampler.decode_indices(model, params, tokens, noise).previews
