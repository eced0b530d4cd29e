"""The least time that sampling can take on a device, from its speed and the work of the models.

D-AR:
    tokens           max(weights and caches read / bandwidth, FLOPs / FLOP/s)
    flow             FLOPs / FLOP/s
    end to end       tokens + flow, one after the other
    first preview    tokens of its groups + flow of its steps

TransDiff, where a part that reads its weights once takes max(bytes / bandwidth, FLOPs / FLOP/s):
    encoder          the condition of every pass, its keys and values included
    denoising        all steps of all passes
    decode           FLOPs / FLOP/s
    end to end       encoder + denoising + decode
    first preview    the first condition + its steps + decode
    streaming        encoder + denoising + decode of every preview
"""

import dataclasses
import functools

from dar_jax.models import kl_vae_work
from dar_jax.models.dar import sampler as dar_sampler
from dar_jax.models.dar import work as dar_work
from dar_jax.models.dar.llama import LlamaConfig
from dar_jax.models.dar.tokenizer import TokenizerConfig
from dar_jax.models.kl_vae import KlVaeConfig
from dar_jax.models.transdiff import sampler as transdiff_sampler
from dar_jax.models.transdiff import work as transdiff_work
from dar_jax.models.transdiff.model import TransDiffConfig
from dar_jax.performance.device_speed import DeviceSpeed


@dataclasses.dataclass(frozen=True)
class DarBounds:
    """Least seconds of a batch of D-AR.

    Attributes:
        prior: the prior's architecture.
        tokenizer: the tokenizer's architecture.
        itemsize: bytes of a weight and of a cached number.
        speed: of the device.
    """

    prior: LlamaConfig
    tokenizer: TokenizerConfig
    itemsize: int
    speed: DeviceSpeed

    @functools.cached_property
    def boundaries(self) -> tuple[int, ...]:
        """Number of tokens after each group."""
        num_tokens, num_groups = self.tokenizer.num_tokens, self.tokenizer.num_groups
        return tuple(num_tokens * (group + 1) // num_groups for group in range(num_groups))

    @functools.cached_property
    def first_group(self) -> int:
        """Groups in front of the first preview."""
        return 1 + next(i for i, b in enumerate(self.boundaries) if b >= self.tokenizer.window)

    def phases(self, batch_size: int, scale: float | None) -> dict[str, float]:
        """Of every phase by name, at a guidance scale; None: of the one that has none."""
        if scale is None:
            return {"flow": self.flow(batch_size)}
        guided = scale > 1
        image = self.end_to_end(batch_size, guided)
        return {
            "tokens": self.tokens(batch_size, guided),
            "end to end": image,
            "first preview": self.first_preview(batch_size, guided),
            "streaming": image,
        }

    def tokens(self, batch_size: int, guided: bool, num_groups: int | None = None) -> float:
        """Of the tokens of the first groups."""
        boundaries = self.boundaries[:num_groups]
        part = dataclasses.replace(self.prior, num_tokens=boundaries[-1])
        num_bytes = dar_work.prior_sampling_bytes(
            self.prior, boundaries, num_rows=batch_size * (1 + guided), itemsize=self.itemsize
        )
        num_flops = batch_size * dar_work.prior_sampling_flops(part, guided)
        return self.speed.seconds(num_bytes, num_flops)

    def flow(self, batch_size: int) -> float:
        """Of the image from given tokens."""
        return self.speed.seconds(0, batch_size * dar_work.decode_flops(self.tokenizer))

    def end_to_end(self, batch_size: int, guided: bool) -> float:
        """Of tokens and image."""
        return self.tokens(batch_size, guided) + self.flow(batch_size)

    def first_preview(self, batch_size: int, guided: bool) -> float:
        """Of the first preview."""
        config, groups = self.tokenizer, self.first_group
        known = dataclasses.replace(
            config, num_tokens=self.boundaries[groups - 1], tokens_per_step=config.window
        )
        steps = dar_sampler.steps_of_groups(config, config.num_steps, groups)
        flops = dar_work.condition_flops(known) + steps * dar_work.flow_step_flops(config)
        flow = self.speed.seconds(0, batch_size * flops)
        return self.tokens(batch_size, guided, groups) + flow

    def memory_bytes(self, batch_size: int, guided: bool) -> int:
        """Bytes of the caches, twice while they grow."""
        rows = batch_size * (1 + guided)
        return 2 * rows * dar_work.kv_cache_bytes(self.prior, itemsize=self.itemsize)


@dataclasses.dataclass(frozen=True)
class TransDiffBounds:
    """Least seconds of a batch of TransDiff.

    Attributes:
        model: architecture of the model of latents.
        vae: the autoencoder's architecture.
        num_steps: of every pass.
        itemsize: bytes of a weight and of a cached number.
        speed: of the device.
    """

    model: TransDiffConfig
    vae: KlVaeConfig
    num_steps: int
    itemsize: int
    speed: DeviceSpeed

    def phases(self, batch_size: int, scale: float | None) -> dict[str, float]:
        """Of every phase by name, at a guidance scale; None: of the one that has none."""
        if scale is None:
            return {"decode": self.decode(batch_size)}
        guided, passes = scale > 1, range(self.model.num_references)
        steps_per_preview = transdiff_sampler.steps_per_preview(self.model, self.num_steps)
        previews = len(passes) * -(-self.num_steps // steps_per_preview)
        encoder = sum(self.encoder(batch_size, guided, k) for k in passes)
        step = [self.step(batch_size, guided, k) for k in passes]
        latents, decode = encoder + self.num_steps * sum(step), self.decode(batch_size)
        first = self.encoder(batch_size, guided, 0) + steps_per_preview * step[0] + decode
        return {
            "encoder": encoder,
            "denoising": self.num_steps * sum(step),
            "end to end": latents + decode,
            "first preview": first,
            "streaming": latents + previews * decode,
        }

    def encoder(self, batch_size: int, guided: bool, num_references: int) -> float:
        """Of the keys and values of the condition after so many references."""
        tokens = (1 + num_references) * self.model.tokens_per_image
        flops = transdiff_work.encode_flops(self.model, num_references)
        flops += transdiff_work.keys_values_flops(self.model, tokens)
        num_bytes = transdiff_work.encode_bytes(self.model, self.itemsize)
        return self.speed.seconds(num_bytes, batch_size * (1 + guided) * flops)

    def step(self, batch_size: int, guided: bool, num_references: int) -> float:
        """Of one step given them."""
        tokens = (1 + num_references) * self.model.tokens_per_image
        rows = batch_size * (1 + guided)
        num_bytes = transdiff_work.step_bytes(
            self.model, tokens, num_rows=rows, itemsize=self.itemsize
        )
        return self.speed.seconds(num_bytes, rows * transdiff_work.step_flops(self.model, tokens))

    def decode(self, batch_size: int) -> float:
        """Of the image from its latent."""
        size = self.model.latent_size * self.vae.stride
        return self.speed.seconds(0, batch_size * kl_vae_work.decode_flops(self.vae, size))

    def memory_bytes(self, batch_size: int, guided: bool) -> int:
        """Bytes of the keys and values of the condition of the last pass."""
        cache = transdiff_work.cache_bytes(self.model, self.model.condition_tokens, self.itemsize)
        return batch_size * (1 + guided) * cache


Bounds = DarBounds | TransDiffBounds
