"""The encoder of T5 1.1 and FLAN-T5 (Raffel et al. 2019, arXiv:1910.10683), on the hub's weights.

    x += attention(rms(x));  x += out(gelu(in_0(rms(x))) * in_1(rms(x)))         per layer

Attention has no scale; a bias by head and distance, of the first layer and used by all, is added to
its scores. Weights keep their names, e.g. `encoder.block.0.layer.0.SelfAttention.q.weight`.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping

import einops
import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.common.typing import Any, Array, Bool, Float, Int
from dar_jax.models.text.layers import Weights, attention, linear


@dataclasses.dataclass(frozen=True)
class T5:
    """What the weights do not say."""

    num_layers: int
    num_heads: int
    epsilon: float
    num_buckets: int
    max_distance: int

    PREFIXES = ("shared.", "encoder.")
    """Of the names of the tensors that are read."""

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> "T5":
        """Read the hub's `config.json`.

        Raises:
            KeyError: an entry is missing.
            ValueError: another activation, such as that of T5 1.0.
        """
        if config["feed_forward_proj"] != "gated-gelu":
            raise ValueError(
                f"feed_forward_proj={config['feed_forward_proj']!r}, expected 'gated-gelu'"
            )
        return cls(
            config["num_layers"],
            config["num_heads"],
            config["layer_norm_epsilon"],
            config["relative_attention_num_buckets"],
            config.get("relative_attention_max_distance", 128),
        )

    @staticmethod
    def sizes_of(config: Mapping[str, Any]) -> tuple[int, int]:
        """Width of the features, and most tokens, which positions do not limit."""
        return config["d_model"], sys.maxsize

    def __call__(
        self, weights: Weights, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
    ) -> Float[Array, "B T F"]:
        """Return the last hidden states.

        Args:
            weights: by name.
            tokens: with padding before or after them.
            mask: False at the padding.
        """

        def norm(x: Array, name: str) -> Array:
            square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
            return x * jax.lax.rsqrt(square + self.epsilon) * weights[f"{name}.weight"]

        x = weights["shared.weight"][tokens]
        table = weights["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        bias = einops.rearrange(table[self.buckets(tokens.shape[1])], "n m h -> h n m")
        for layer in range(self.num_layers):
            where = f"encoder.block.{layer}.layer"
            y = norm(x, f"{where}.0.layer_norm")
            names = [f"{where}.0.SelfAttention.{name}" for name in "qkvo"]
            x += attention(
                weights,
                names,
                y,
                num_heads=self.num_heads,
                allowed=mask[:, None, None],
                scale=1.0,
                bias=bias,
            )
            y, dense = norm(x, f"{where}.1.layer_norm"), f"{where}.1.DenseReluDense"
            gate = jax.nn.gelu(linear(weights, f"{dense}.wi_0", y), approximate=True)
            x += linear(weights, f"{dense}.wo", gate * linear(weights, f"{dense}.wi_1", y))
        return norm(x, "encoder.final_layer_norm")

    def buckets(self, length: int) -> Int[np.ndarray, "T T"]:
        """Bucket of the distance from every query to every key: half of them for later keys.

        Half of these have one distance each; the others, of growing width, end at `max_distance`.
        """
        half = self.num_buckets // 2
        exact = half // 2
        relative = np.arange(length) - np.arange(length)[:, None]
        distance = np.abs(relative)
        wide = np.log(np.maximum(distance, 1) / exact) / math.log(self.max_distance / exact)
        # A power of the base may lie one rounding below its bucket.
        wide = exact + np.floor(wide * (half - exact) + 1e-6).astype(int)
        bucket = np.where(distance < exact, distance, np.minimum(wide, half - 1))
        return bucket + half * (relative > 0)
