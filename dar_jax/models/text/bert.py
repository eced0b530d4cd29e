"""BERT as an encoder of tokens (Devlin et al. 2018, arXiv:1810.04805), on the hub's weights.

    x = norm(words + positions + types[0])
    x = norm(x + attention(x));  x = norm(x + down(gelu(up(x))))         per layer

Weights keep their names, e.g. `encoder.layer.0.attention.self.query.weight` [out, in].
"""

import dataclasses
from collections.abc import Mapping

import einops
import jax
import jax.numpy as jnp

from dar_jax.common.typing import Any, Array, Bool, Float, Int


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

    def __call__(
        self, weights: Mapping[str, Array], tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
    ) -> Float[Array, "B T F"]:
        """Return the last hidden states.

        Args:
            weights: by name.
            tokens: with padding anywhere.
            mask: False at the padding.
        """

        def norm(x: Array, name: str) -> Array:
            mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
            x = (x - mean) * jax.lax.rsqrt(variance + self.epsilon)
            return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

        def linear(x: Array, name: str) -> Array:
            return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

        def heads(x: Array, name: str) -> Array:
            return einops.rearrange(linear(x, name), "b t (h d) -> b h t d", h=self.num_heads)

        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        x = weights["embeddings.word_embeddings.weight"][tokens]
        x += weights["embeddings.position_embeddings.weight"][positions]
        x = norm(x + weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for layer in range(self.num_layers):
            where = f"encoder.layer.{layer}"
            q, k, v = (heads(x, f"{where}.attention.self.{n}") for n in ("query", "key", "value"))
            scores = q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5
            scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
            out = einops.rearrange(jax.nn.softmax(scores, -1) @ v, "b h t d -> b t (h d)")
            out = linear(out, f"{where}.attention.output.dense")
            x = norm(x + out, f"{where}.attention.output.LayerNorm")
            hidden = jax.nn.gelu(linear(x, f"{where}.intermediate.dense"), approximate=False)
            x = norm(x + linear(hidden, f"{where}.output.dense"), f"{where}.output.LayerNorm")
        return x
