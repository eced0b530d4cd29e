"""CLIP (Radford et al. 2021, arXiv:2103.00020), on the hub's weights.

    x += attention(norm(x));  x += down(act(up(norm(x))))         per layer, of both towers

The text tower is causal, and a text's embedding is that of its last token. That of an image is of
the class token, which stands before its patches. Weights keep their names, e.g.
`text_model.encoder.layers.0.self_attn.q_proj.weight`.
"""

import dataclasses
from collections.abc import Mapping

import einops
import jax
import jax.numpy as jnp

from dar_jax.common.typing import Any, Array, Bool, Float, Int
from dar_jax.models.text.layers import Weights, attention, linear, norm

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the colours in [0, 1], from CLIP's repository."""


@dataclasses.dataclass(frozen=True)
class Tower:
    """What the weights of one do not say; the defaults are the hub's, which its files leave out."""

    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act={self.hidden_act!r}, expected one of {', '.join(ACTIVATIONS)}"
            )

    def __call__(
        self,
        weights: Weights,
        name: str,
        x: Float[Array, "B T D"],
        allowed: Bool[Array, "_ _ _ _"],
    ) -> Float[Array, "B T D"]:
        act = ACTIVATIONS[self.hidden_act]
        for layer in range(self.num_hidden_layers):
            where = f"{name}.encoder.layers.{layer}"
            y = norm(weights, f"{where}.layer_norm1", x, self.layer_norm_eps)
            names = [f"{where}.self_attn.{part}_proj" for part in ("q", "k", "v", "out")]
            x += attention(weights, names, y, num_heads=self.num_attention_heads, allowed=allowed)
            y = norm(weights, f"{where}.layer_norm2", x, self.layer_norm_eps)
            x += linear(weights, f"{where}.mlp.fc2", act(linear(weights, f"{where}.mlp.fc1", y)))
        return x


@dataclasses.dataclass(frozen=True)
class Clip:
    """Both towers."""

    text: Tower
    vision: Tower
    image_size: int
    patch_size: int

    PREFIXES = ("text_model.", "vision_model.", "text_projection.", "visual_projection.")
    """Of the names of the tensors that are read."""

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> "Clip":
        """Read the hub's `config.json`.

        Raises:
            KeyError: an entry is missing.
            ValueError: another activation.
        """
        text, vision = config["text_config"], config["vision_config"]
        defaults = {"image_size": 224, "patch_size": 32, "num_attention_heads": 12}
        vision = {**defaults, **vision}
        names = [field.name for field in dataclasses.fields(Tower)]
        text_tower, image_tower = (
            Tower(**{name: one[name] for name in names if name in one}) for one in (text, vision)
        )
        return cls(text_tower, image_tower, vision["image_size"], vision["patch_size"])

    @staticmethod
    def sizes_of(config: Mapping[str, Any]) -> tuple[int, int]:
        """Width of the features of texts, and most tokens."""
        text = {"hidden_size": 512, "max_position_embeddings": 77, **config["text_config"]}
        return text["hidden_size"], text["max_position_embeddings"]

    def __call__(
        self, weights: Weights, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
    ) -> Float[Array, "B T F"]:
        """Return the last hidden states of the text tower.

        Args:
            weights: by name.
            tokens: with padding anywhere.
            mask: False at the padding.
        """
        name = "text_model"
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        x = weights[f"{name}.embeddings.token_embedding.weight"][tokens]
        x += weights[f"{name}.embeddings.position_embedding.weight"][positions]
        causal = jnp.tri(tokens.shape[1], dtype=bool)
        x = self.text(weights, name, x, causal & mask[:, None, None])
        return norm(weights, f"{name}.final_layer_norm", x, self.text.layer_norm_eps)

    def embed_texts(self, weights: Weights, features: Float[Array, "B T F"]) -> Float[Array, "B D"]:
        """Return what texts and images share, given features that end with a text's last token."""
        return linear(weights, "text_projection", features[:, -1])

    def embed_images(
        self, weights: Weights, images: Float[Array, "B H W 3"]
    ) -> Float[Array, "B D"]:
        """Return what texts and images share.

        Args:
            weights: by name.
            images: in [0, 1], of `image_size`.
        """
        name, p = "vision_model", self.patch_size
        images = (images - jnp.asarray(MEAN)) / jnp.asarray(STD)
        patches = einops.rearrange(images, "b (h p) (w q) c -> b (h w) (c p q)", p=p, q=p)
        kernel = weights[f"{name}.embeddings.patch_embedding.weight"]
        patches @= kernel.reshape(len(kernel), -1).T
        first = weights[f"{name}.embeddings.class_embedding"]
        first = jnp.broadcast_to(first, (len(patches), 1, len(first)))
        x = jnp.concatenate([first, patches], axis=1)
        x += weights[f"{name}.embeddings.position_embedding.weight"]
        x = norm(weights, f"{name}.pre_layrnorm", x, self.vision.layer_norm_eps)
        x = self.vision(weights, name, x, jnp.ones((1, 1, 1, 1), bool))
        x = norm(weights, f"{name}.post_layernorm", x[:, 0], self.vision.layer_norm_eps)
        return linear(weights, "visual_projection", x)
