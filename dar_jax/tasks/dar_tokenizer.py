"""Training the sequential diffusion tokenizer (D-AR section 3; spec: `VQModel` in train mode).

indices, codes = encode(image)                    straight-through vector quantisation
u ~ U(0, 1), noise ~ N(0, I)                      one of each per image
window = condition(codes)[window_start(u)]        the tokens that this time may see
t = shift(u);  x_t = t data + (1 - t) noise       data = data_std * image
flow loss = mean((velocity(x_t, t, window) - (data - noise))^2) / data_std^2
loss = flow + codebook + commitment + entropy_weight * entropy
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

from dar_jax.common import image as images
from dar_jax.common.typing import Any, Array, Float, Params, PRNGKeyArray
from dar_jax.flow.path import interpolate, predict_data, velocity
from dar_jax.flow.times import shift_times
from dar_jax.models.dar import sampler, work
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
from dar_jax.nn.functional import FunctionalModel
from dar_jax.tasks.codebook import CodebookPerplexity, CodebookUsage, code_counts

NUM_PICTURES = 8


@dataclasses.dataclass(frozen=True)
class TokenizerLossConfig:
    """Loss weights.

    Attributes:
        entropy_weight: of the entropy term that spreads the codes; 0 in the released recipe.
    """

    entropy_weight: float = 0.0


class TrainingForward(NamedTuple):
    """One training pass: the scalar losses and what further losses compare.

    Attributes:
        flow_loss: float32 scalar.
        codebook_loss: float32 scalar.
        commitment_loss: float32 scalar.
        quantized: indices and codes.
        t: shifted times [B].
        x_t: noisy images in data units [B, H, W, 3].
        predicted: the clean images that the velocity points to, in [-1, 1].
        features: alignment features [B, M, F] or None.
    """

    flow_loss: Array
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
    losses = quantization_losses(quantized, start + config.window - 1)
    return TrainingForward(
        flow_loss=jnp.mean(error**2) / data_std**2,
        codebook_loss=losses.codebook,
        commitment_loss=losses.commitment,
        quantized=quantized,
        t=t,
        x_t=x_t,
        predicted=predict_data(x_t, prediction.velocity, t) / data_std,
        features=prediction.features,
    )


class DarTokenizerTask:
    """See the module's docstring."""

    kind = "dar_tokenizer"

    def __init__(self, config: TokenizerConfig, loss_config: TokenizerLossConfig, compute: Compute):
        self.model = FunctionalModel(Tokenizer, config, compute)
        self.loss_config = loss_config

    @property
    def flops_per_image(self) -> float:
        return work.tokenizer_train_flops(self.model.config)

    def init(self, rng: PRNGKeyArray) -> Params:
        return self.model.init(rng)

    def frozen(self) -> Params:
        return {}

    def loss(
        self, params: Params, batch: Mapping[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> tuple[Array, dict[str, Array]]:
        del frozen
        image = images.to_float(batch["pixels"])
        rng_time, rng_noise = jax.random.split(rng)
        u = jax.random.uniform(rng_time, image.shape[:1])
        noise = jax.random.normal(rng_noise, image.shape)
        tokenizer = self.model.bind(params)
        out = training_forward(tokenizer, image, u, noise)

        loss = out.flow_loss + out.codebook_loss + out.commitment_loss
        outputs = {
            "flow_loss": out.flow_loss,
            "codebook_loss": out.codebook_loss,
            "commitment_loss": out.commitment_loss,
            "dead_code_rate": dead_code_rate(out.quantized.codes),
            "code_counts": code_counts(out.quantized.indices, self.model.config.codebook_size),
        }
        if self.loss_config.entropy_weight:
            entropy = entropy_loss(tokenizer.quantizer.distances(out.quantized.z))
            loss += self.loss_config.entropy_weight * entropy
            outputs["entropy_loss"] = entropy
        return loss, outputs

    def metrics(self) -> dict[str, type[metrics.Metric]]:
        averages = ["flow_loss", "codebook_loss", "commitment_loss", "dead_code_rate"]
        averages += ["entropy_loss"] if self.loss_config.entropy_weight else []
        return {
            **{name: metrics.Average.from_output(name) for name in averages},
            "codebook_usage": CodebookUsage,
            "codebook_perplexity": CodebookPerplexity,
        }

    def pictures(
        self, params: Params, batch: Mapping[str, Array], rng: PRNGKeyArray, frozen: Params
    ) -> dict[str, np.ndarray]:
        """Rows: an original, its previews after each step, the last one the reconstruction."""
        del frozen
        pixels = jnp.asarray(batch["pixels"][:NUM_PICTURES])
        previews = _reconstruct(self.model, params, images.to_float(pixels), rng)
        strip = np.concatenate([pixels[None], images.to_pixels(previews)])
        rows = einops.rearrange(strip, "columns b h w c -> (b columns) h w c")
        return {"reconstruction": images.grid(rows, columns=len(strip))}

    def model_config(self) -> dict[str, Any]:
        return dataclasses.asdict(self.model.config)

    def companions(self) -> dict[str, str]:
        return {}


@functools.partial(jax.jit, static_argnames="model")
def _reconstruct(
    model: FunctionalModel[Tokenizer], params: Params, image: Array, rng: PRNGKeyArray
) -> Float[Array, "steps B H W 3"]:
    indices = model.bind(params).encode(image).indices
    noise = jax.random.normal(rng, image.shape)
    return sampler.decode_indices(model, params, indices, noise).previews
