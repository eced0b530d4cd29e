"""DINOv2 weights under the names of its repository, of timm or of HF transformers.

The first two share their names; HF's are mapped to them. All of them have the position table of
518 x 518 pixels, which is resampled here to that of 224 x 224.
"""

import re
from collections.abc import Mapping
from typing import Any

import einops
import numpy as np

from dar_jax.common.image import bicubic_matrix
from dar_jax.common.typing import Float, Params
from dar_jax.convert import rules
from dar_jax.models.frozen.dinov2 import SIZES, Dinov2Config

UNUSED_KEYS = ("mask_token",)
INTERPOLATION_OFFSET = 0.1
"""Added to the target grid by the reference against rounding; it shifts the sample points a bit."""
HF_PREFIX = re.compile(r"^(dinov2\.)?(?=embeddings\.|encoder\.|layernorm\.)")
HF_NAMES = (
    (r"embeddings\.(cls_token|mask_token)", r"\1"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"encoder\.layer\.", "blocks."),
    (r"attention\.attention\.(query|key|value)", r"attn.\1"),
    (r"attention\.output\.dense", "attn.proj"),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
    (r"^layernorm\.", "norm."),
)
HF_QUERY = re.compile(r"^(.*attn\.)query\.(weight|bias)$")


def table(config: Dinov2Config) -> tuple[rules.Rule, ...]:
    """Conversion table of `models.frozen.dinov2.Dinov2`, of the resampled position table."""
    qkv = [config.dim] * 3
    kernels = tuple(f"attention/{name}/kernel" for name in "qkv")
    biases = tuple(f"attention/{name}/bias" for name in "qkv")
    block = (
        *rules.norm("norm1", "norm1"),
        rules.Rule("attn.qkv.weight", kernels, rules.split(qkv)),
        rules.Rule("attn.qkv.bias", biases, SPLIT_BIAS),
        *rules.linear("attn.proj", "attention/out"),
        *rules.tensor("ls1.gamma", "scale1"),
        *rules.norm("norm2", "norm2"),
        *rules.linear("mlp.fc1", "mlp/up"),
        *rules.linear("mlp.fc2", "mlp/down"),
        *rules.tensor("ls2.gamma", "scale2"),
    )
    patch = rules.patch_conv(config.patch_size)
    return (
        *rules.tensor("cls_token", "class_token", rules.axes("1 1 d -> d")),
        *rules.tensor("pos_embed", "position_table", rules.axes("1 n d -> n d")),
        *rules.linear("patch_embed.proj", "patch_embed", kernel=patch),
        *rules.under("blocks.{i}", "stack/blocks", block),
        *rules.norm("norm", "norm"),
    )


SPLIT_BIAS = rules.Transform(
    lambda array: tuple(einops.rearrange(array, "(three d) -> three d", three=3)),
    lambda *leaves: einops.rearrange(list(leaves), "three d -> (three d)"),
)


def config_of(state_dict: Mapping[str, Any]) -> Dinov2Config:
    """Tell the size from the weights.

    Raises:
        ValueError: it is none of S, B and L.
    """
    width = np.shape(_official(state_dict).get("cls_token", ()))[-1:]
    for config in SIZES.values():
        if width == (config.dim,):
            return config
    known = ", ".join(f"{name} ({config.dim})" for name, config in SIZES.items())
    raise ValueError(f"no DINOv2 of a known size: cls_token has width {width}; known: {known}")


def from_reference(state_dict: Mapping[str, Any], config: Dinov2Config, like: Params) -> Params:
    """Convert DINOv2 weights to the structure of `like` (possibly abstract).

    Raises:
        ValueError: as `rules.to_params`.
    """
    official = _official(state_dict)
    if "pos_embed" in official:
        official["pos_embed"] = resample_positions(
            np.asarray(official["pos_embed"]), round(config.num_patches**0.5)
        )
    return rules.to_params(table(config), official, like, ignored=UNUSED_KEYS)


def resample_positions(
    positions: Float[np.ndarray, "1 N D"], side: int
) -> Float[np.ndarray, "1 M D"]:
    """Resample the square grid behind the first (class) position to `side` x `side`.

    Bicubic without antialiasing, with the scale (side + 0.1) / side_in that the reference passes
    to `interpolate`: so are the released models used.
    """
    first, grid = positions[:, :1], positions[:, 1:]
    side_in = round(grid.shape[1] ** 0.5)
    if side_in == side:
        return positions
    matrix = bicubic_matrix(side_in, side, step=side_in / (side + INTERPOLATION_OFFSET))
    grid = einops.rearrange(grid, "1 (h w) d -> h w d", h=side_in)
    grid = np.einsum("hwd,yh,xw->yxd", grid, matrix, matrix).reshape(1, -1, grid.shape[-1])
    return np.concatenate([first, grid.astype(positions.dtype)], axis=1)


def _official(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Rename HF's tensors, and join its queries, keys and values."""
    named = {}
    for name, array in state_dict.items():
        if HF_PREFIX.match(name):
            name = HF_PREFIX.sub("", name)
            for pattern, replacement in HF_NAMES:
                name = re.sub(pattern, replacement, name)
        named[name] = array
    for match in [match for name in named if (match := HF_QUERY.match(name))]:
        names = [f"{match[1]}{part}.{match[2]}" for part in ("query", "key", "value")]
        if all(name in named for name in names):
            parts = [np.asarray(named.pop(name)) for name in names]
            named[f"{match[1]}qkv.{match[2]}"] = np.concatenate(parts)
    return named
