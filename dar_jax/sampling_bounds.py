"""The least time that sampling can take on a device, from its speed and the work of the models.

tokens           max(weights and caches read / bandwidth, FLOPs / FLOP/s)
flow             FLOPs / FLOP/s
end to end       tokens + flow, one after the other
first preview    tokens of its groups + flow of its steps
"""

import dataclasses
import functools
from collections.abc import Sequence

from dar_jax.device_speed import DeviceSpeed
from dar_jax.models.dar import sampler, work
from dar_jax.models.dar.llama import LlamaConfig
from dar_jax.models.dar.tokenizer import TokenizerConfig


@dataclasses.dataclass(frozen=True)
class SamplingBounds:
    """Least seconds of a batch.

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

    def tokens(self, batch_size: int, guided: bool, num_groups: int | None = None) -> float:
        """Of the tokens of the first groups."""
        boundaries = self.boundaries[:num_groups]
        part = dataclasses.replace(self.prior, num_tokens=boundaries[-1])
        num_bytes = work.prior_sampling_bytes(
            self.prior, boundaries, num_rows=batch_size * (1 + guided), itemsize=self.itemsize
        )
        return self.speed.seconds(num_bytes, batch_size * work.prior_sampling_flops(part, guided))

    def flow(self, batch_size: int) -> float:
        """Of the image from given tokens."""
        return self.speed.seconds(0, batch_size * work.decode_flops(self.tokenizer))

    def end_to_end(self, batch_size: int, guided: bool) -> float:
        """Of tokens and image."""
        return self.tokens(batch_size, guided) + self.flow(batch_size)

    def first_preview(self, batch_size: int, guided: bool) -> float:
        """Of the first preview."""
        config, groups = self.tokenizer, self.first_group
        known = dataclasses.replace(
            config, num_tokens=self.boundaries[groups - 1], tokens_per_step=config.window
        )
        steps = sampler.steps_of_groups(config, config.num_steps, groups)
        flops = work.condition_flops(known) + steps * work.flow_step_flops(config)
        flow = self.speed.seconds(0, batch_size * flops)
        return self.tokens(batch_size, guided, groups) + flow

    def of_all_rows(self, batch_size: int, scales: Sequence[float]) -> float:
        """Sum over the rows of a batch size."""
        return self.flow(batch_size) + sum(
            self.tokens(batch_size, scale > 1)
            + 2 * self.end_to_end(batch_size, scale > 1)
            + self.first_preview(batch_size, scale > 1)
            for scale in scales
        )
