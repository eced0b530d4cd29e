"""Official TransDiff checkpoints: names, layouts and configs of the reference, and ours.

The table follows the state dicts of the reference's `TransDiff` (its `models/transdiff.py` and
`models/transdiff_mrar.py` share all names); both directions come from it. Positions and mask tokens
have a leading axis of 1 there.
"""

from collections.abc import Mapping

from dar_jax.common.typing import Any, Params
from dar_jax.convert.rules import (
    Rule,
    axes,
    linear,
    norm,
    split,
    tensor,
    to_params,
    to_state_dict,
    under,
)
from dar_jax.models.transdiff.model import TransDiff, TransDiffConfig
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.pipelines.transdiff import LatentPipeline

CONDITION_TOKENS = 256
LATENT_STRIDE = 16
UNBATCH = axes("1 n d -> n d")
LAYER_NORM_EPS = 1e-6


def from_reference(
    state_dict: Mapping[str, Any], config: Mapping[str, Any], *, compute: Compute | None = None
) -> LatentPipeline:
    """Build the model from the reference's state dict (arrays) and the arguments of its class.

    Args:
        state_dict: arrays under the reference's names.
        config: the constructor's arguments, with or without an outer `model` key.
        compute: execution choices.

    Raises:
        ValueError: keys or shapes that do not fit the config, or an unsupported config.
    """
    architecture = transdiff_config(config)
    model = FunctionalModel(TransDiff, architecture, compute or Compute())
    return LatentPipeline(model, transdiff_params(state_dict, architecture))


def transdiff_params(state_dict: Mapping[str, Any], config: TransDiffConfig) -> Params:
    """Convert a state dict; every entry is a parameter."""
    like = FunctionalModel(TransDiff, config).abstract_params()
    return to_params(transdiff_rules(config), state_dict, like)


def transdiff_state_dict(params: Params, config: TransDiffConfig) -> dict[str, Any]:
    """Convert parameters to a state dict that the reference loads strictly.

    Raises:
        ValueError: a size that the reference has fixed at another value.
    """
    if config.condition_tokens != CONDITION_TOKENS:
        raise ValueError(
            f"the reference cannot hold condition_tokens={config.condition_tokens}, only "
            f"{CONDITION_TOKENS}"
        )
    return to_state_dict(transdiff_rules(config), params)


def transdiff_config(config: Mapping[str, Any]) -> TransDiffConfig:
    """Translate the arguments of the reference's class.

    A patch size of 2 is the MRAR model's: the one-step model has 1.

    Raises:
        ValueError: a missing key, or a value that is not supported.
    """
    c = config.get("model", config)
    try:
        for name in ("embed_dim", "num_heads"):
            if c[f"encoder_{name}"] != c[f"decoder_{name}"]:
                raise ValueError(
                    f"reference config: encoder_{name}={c[f'encoder_{name}']} must equal "
                    f"decoder_{name}={c[f'decoder_{name}']}"
                )
        if c.get("layer_norm_eps", LAYER_NORM_EPS) != LAYER_NORM_EPS:
            raise ValueError(
                f"reference config layer_norm_eps={c['layer_norm_eps']!r} is not supported"
            )
        return TransDiffConfig(
            latent_size=c["img_size"] // LATENT_STRIDE,
            channels=c["vae_embed_dim"],
            num_classes=c["class_num"],
            num_references=1 if c["patch_size"] == 1 else 4,
            reference_patch_size=c["patch_size"],
            condition_tokens=CONDITION_TOKENS,
            buffer_size=c["buffer_size"],
            dim=c["encoder_embed_dim"],
            num_heads=c["encoder_num_heads"],
            mlp_ratio=float(c.get("mlp_ratio", TransDiffConfig.mlp_ratio)),
            encoder_depth=2 * c["encoder_depth"],
            decoder_depth=c["decoder_depth"],
            attention_dropout=c["attn_dropout"],
            dropout=c["proj_dropout"],
            label_dropout=c["label_drop_prob"],
        )
    except KeyError as error:
        raise ValueError(f"reference config lacks the key {error}") from error
    except TypeError as error:
        raise ValueError(f"reference config holds a value of another type ({error})") from error


def transdiff_rules(config: TransDiffConfig) -> tuple[Rule, ...]:
    """Table of all tensors."""
    thirds = (config.dim,) * 3
    fused = (
        Rule("qkv.weight", ("q/kernel", "k/kernel", "v/kernel"), split(thirds)),
        Rule("qkv.bias", ("q/bias", "k/bias", "v/bias"), split(thirds, "o -> o")),
        *linear("proj", "out"),
    )
    apart = (
        *linear("wq", "q"),
        *linear("wk", "k"),
        *linear("wv", "v"),
        *linear("proj", "out"),
    )
    mlp = (*linear("fc1", "up"), *linear("fc2", "down"))
    encoder_block = (
        *norm("norm1", "norm1"),
        *norm("norm2", "norm2"),
        *under("attn", "attention", fused),
        *under("mlp", "mlp", mlp),
    )
    decoder_block = (
        *tensor("scale_shift_table", "modulation_table", UNBATCH),
        *norm("norm1", "norm1"),
        *norm("norm2", "norm2"),
        *norm("norm3", "norm3"),
        *under("attn1", "attention", fused),
        *under("attn2", "cross_attention", apart),
        *under("mlp", "mlp", mlp),
    )
    decoder = (
        *tensor("diffusion_pos_embed_learned", "position_table", UNBATCH),
        *linear("time_embed.time_embedder.linear_1", "time_embed/up"),
        *linear("time_embed.time_embedder.linear_2", "time_embed/down"),
        *linear("time_embed.time_proj", "modulation"),
        *linear("cond_embed", "condition_projection"),
        *linear("input_proj", "token_embed"),
        *under("res_blocks.{i}", "stack/blocks", decoder_block),
        *tensor("final_layer.scale_shift_table", "final_layer/modulation_table", UNBATCH),
        *linear("final_layer.linear", "final_layer/out"),
    )
    return (
        *tensor("fake_latent", "encoder/null_class"),
        *tensor("mask_token", "encoder/mask_token", UNBATCH),
        *tensor("encoder_pos_embed_learned", "encoder/position_table", UNBATCH),
        *tensor("diffusion_pos_embed_learned", "encoder/condition_position_table", UNBATCH),
        *tensor("class_emb.weight", "encoder/class_table"),
        *linear("z_proj", "encoder/reference_projection"),
        *norm("z_proj_ln", "encoder/input_norm"),
        *under("encoder_blocks.{i}", "encoder/stack/blocks", encoder_block),
        *norm("encoder_norm", "encoder/norm"),
        *under("diffdecoder.net", "decoder", decoder),
    )
