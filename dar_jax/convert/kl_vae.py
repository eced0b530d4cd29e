"""The official KL-16 checkpoint (MAR, TransDiff): names, layouts and config of the reference.

The file is a dict whose `model` is the state dict of the reference's `AutoencoderKL`, 312 tensors.
It is loaded non-strictly there, and may hold more, as the losses that it was trained with.
"""

from collections.abc import Iterable, Mapping

from dar_jax.common.typing import Any, Params
from dar_jax.convert import rules
from dar_jax.models.kl_vae import GROUP_NORM_EPSILON, LATENT_SCALE, KlVae, KlVaeConfig
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.pipelines.kl_vae import KlVaePipeline

NOMINAL_SIZE = 256
"""Image size at which the reference decides which levels have attention."""
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


def from_reference(
    state_dict: Mapping[str, Any], config: Mapping[str, Any], *, compute: Compute | None = None
) -> KlVaePipeline:
    """Build the autoencoder from the reference's state dict (arrays) and arguments.

    Args:
        state_dict: arrays under the reference's names; those of no part of the model are ignored.
        config: the reference's arguments, as `architecture` takes them; {} is MAR's KL-16.
        compute: execution choices.

    Raises:
        ValueError: keys or shapes that do not fit the config, or an unsupported config.
    """
    model = FunctionalModel(KlVae, architecture(config), (compute or Compute()).of_decoding())
    return KlVaePipeline(model, params(state_dict, model.config))


def params(state_dict: Mapping[str, Any], config: KlVaeConfig) -> Params:
    """Convert a state dict.

    Raises:
        ValueError: a tensor of the model is missing or has another shape, or one of its parts has
            more of them.
    """
    like = FunctionalModel(KlVae, config).abstract_params()
    return rules.to_params(table(config), state_dict, like, ignored=unused_keys(state_dict))


def unused_keys(names: Iterable[str]) -> tuple[str, ...]:
    """Names of what is not part of the model: a training loss."""
    return tuple(name for name in names if not name.startswith(PARTS))


def state_dict(params: Params, config: KlVaeConfig) -> dict[str, Any]:
    """Convert parameters to a state dict that the reference loads strictly."""
    return rules.to_state_dict(table(config), params)


def architecture(config: Mapping[str, Any]) -> KlVaeConfig:
    """Translate the reference's arguments (`ch`, `ch_mult`, ...); absent ones are MAR's.

    Raises:
        ValueError: a variant that the released model does not use.
    """
    c = config.get("model", config)
    default = KlVaeConfig()
    channels = c.get("z_channels", default.latent_channels)
    fixed = {
        "embed_dim": channels,
        "double_z": True,
        "use_variational": True,
        "attn_resolutions_decoder": [],
        "group_norm_eps": GROUP_NORM_EPSILON,
        "in_channels": 3,
        "out_ch": 3,
    }
    for name, supported in fixed.items():
        if c.get(name, supported) != supported:
            raise ValueError(f"reference config {name}={c[name]!r} is not supported")
    factors = tuple(c.get("ch_mult", default.width_factors))
    sides = [c.get("resolution", NOMINAL_SIZE) >> level for level in range(len(factors))]
    attended = c.get("attn_resolutions_encoder", (16,))
    return KlVaeConfig(
        width=c.get("ch", default.width),
        width_factors=factors,
        num_blocks=c.get("num_res_blocks", default.num_blocks),
        attention_levels=tuple(level for level, side in enumerate(sides) if side in attended),
        latent_channels=channels,
        num_groups=c.get("num_groups", default.num_groups),
        latent_scale=float(c.get("latent_scale", config.get("latent_scale", LATENT_SCALE))),
    )


ATTENTION = (
    *rules.norm("norm", "norm"),
    *rules.linear("q", "attention/q", kernel=rules.POINTWISE),
    *rules.linear("k", "attention/k", kernel=rules.POINTWISE),
    *rules.linear("v", "attention/v", kernel=rules.POINTWISE),
    *rules.linear("proj_out", "attention/out", kernel=rules.POINTWISE),
)
RESIDUAL = (
    *rules.norm("norm1", "norm_1"),
    *rules.conv("conv1", "conv_1"),
    *rules.norm("norm2", "norm_2"),
    *rules.conv("conv2", "conv_2"),
)
SHORTCUT = rules.linear("nin_shortcut", "shortcut", kernel=rules.POINTWISE)
ENDS = (
    *rules.conv("conv_in", "stem"),
    *rules.under("mid.block_1", "middle/first", RESIDUAL),
    *rules.under("mid.attn_1", "middle/attention", ATTENTION),
    *rules.under("mid.block_2", "middle/second", RESIDUAL),
    *rules.norm("norm_out", "norm"),
    *rules.conv("conv_out", "head"),
)


def table(config: KlVaeConfig) -> tuple[rules.Rule, ...]:
    """Conversion table of `models.kl_vae.KlVae`."""
    widths = config.widths
    encoder, decoder = [*ENDS], [*ENDS]
    for level, (above, width) in enumerate(zip((config.width, *widths), widths, strict=False)):
        attended = level in config.attention_levels
        block = _level(config.num_blocks, widens=above != width, attention=attended)
        encoder += rules.under(f"down.{level}", f"levels/{level}", block)
    for level, (width, below) in enumerate(zip(widths, (*widths[1:], widths[-1]), strict=True)):
        block = _level(config.num_blocks + 1, widens=below != width)
        decoder += rules.under(f"up.{level}", f"levels/{level}", block)
    for level in range(len(widths) - 1):
        encoder += rules.conv(f"down.{level}.downsample.conv", f"levels/{level}/resample/conv")
        decoder += rules.conv(f"up.{level + 1}.upsample.conv", f"levels/{level + 1}/resample/conv")
    return (
        *rules.under("encoder", "encoder", encoder),
        *rules.linear("quant_conv", "to_moments", kernel=rules.POINTWISE),
        *rules.linear("post_quant_conv", "from_latent", kernel=rules.POINTWISE),
        *rules.under("decoder", "decoder", decoder),
    )


def _level(num_blocks: int, *, widens: bool, attention: bool = False) -> list[rules.Rule]:
    """Blocks of one level; the first one changes the width if the level does."""
    result = list(rules.under("block.0", "residuals/0", SHORTCUT)) if widens else []
    for number in range(num_blocks):
        result += rules.under(f"block.{number}", f"residuals/{number}", RESIDUAL)
        if attention:
            result += rules.under(f"attn.{number}", f"attentions/{number}", ATTENTION)
    return result
