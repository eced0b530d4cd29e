"""BERT as an encoder of tokens (Devlin et al. 2018, arXiv:1810.04805), on the hub's weights.

    x = norm(words + positions + types[0])
    x = norm(x + attention(x));  x = norm(x + down(gelu(up(x))))         per layer

Weights keep their names, e.g. `encoder.layer.0.attention.self.query.weight` [out, in].
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dar_jax.common.typing import Any, Array, Bool, Float, Int
from dar_jax.models.text.layers import Weights, attention, linear, norm


@dataclasses.dataclass(frozen=True)
class Bert:
    """What the weights do not say."""

    num_layers: int
    num_heads: int
    epsilon: float

    PREFIXES = ("embeddings.", "encoder.")
    """Of the names of the tensors that are read."""

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> "Bert":
        """Read the hub's `config.json`.

        Raises:
            KeyError: an entry is missing.
            ValueError: another activation or another kind of positions.
        """
        if (config["hidden_act"], config.get("position_embedding_type", "absolute")) != (
            "gelu",
            "absolute",
        ):
            raise ValueError("expected hidden_act='gelu' and absolute positions")
        names = "num_hidden_layers", "num_attention_heads", "layer_norm_eps"
        return cls(*(config[name] for name in names))

    @staticmethod
    def sizes_of(config: Mapping[str, Any]) -> tuple[int, int]:
        """Width of the features, and most tokens."""
        return config["hidden_size"], config["max_position_embeddings"]

    def __call__(
        self, weights: Weights, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
    ) -> Float[Array, "B T F"]:
        """Return the last hidden states.

        Args:
            weights: by name.
            tokens: with padding anywhere.
            mask: False at the padding.
        """

        def normed(name: str, x: Array) -> Array:
            return norm(weights, name, x, self.epsilon)

        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        x = weights["embeddings.word_embeddings.weight"][tokens]
        x += weights["embeddings.position_embeddings.weight"][positions]
        x += weights["embeddings.token_type_embeddings.weight"][0]
        x = normed("embeddings.LayerNorm", x)
        for layer in range(self.num_layers):
            where = f"encoder.layer.{layer}"
            names = [f"{where}.attention.self.{part}" for part in ("query", "key", "value")]
            names.append(f"{where}.attention.output.dense")
            allowed = mask[:, None, None]
            out = attention(weights, names, x, num_heads=self.num_heads, allowed=allowed)
            x = normed(f"{where}.attention.output.LayerNorm", x + out)
            hidden = linear(weights, f"{where}.intermediate.dense", x)
            hidden = jax.nn.gelu(hidden, approximate=False)
            out = linear(weights, f"{where}.output.dense", hidden)
            x = normed(f"{where}.output.LayerNorm", x + out)
        return x
