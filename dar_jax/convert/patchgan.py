"""PatchGAN weights under the reference's names (`main.0.weight`, ...).

Its `main` is one sequence: convolution, activation, then (convolution, norm, activation) for each
layer, then the last convolution.
"""

from collections.abc import Mapping
from typing import Any

from dar_jax.common.typing import Params
from dar_jax.convert import rules
from dar_jax.models.patchgan import PatchGanConfig


def table(config: PatchGanConfig) -> tuple[rules.Rule, ...]:
    """Conversion table of `models.patchgan.PatchGan`."""
    result = [*rules.conv("main.0", "stem")]
    for i in range(config.num_layers):
        number = 2 + 3 * i
        result += rules.conv(f"main.{number}", f"layers/{i}/conv", bias=False)
        result += rules.linear(f"main.{number + 1}.embedder.mlp.0", f"layers/{i}/norm/modulation")
    result += rules.conv(f"main.{2 + 3 * config.num_layers}", "head")
    return tuple(result)


def from_reference(state_dict: Mapping[str, Any], config: PatchGanConfig, like: Params) -> Params:
    """Convert discriminator weights to the structure of `like` (possibly abstract).

    Raises:
        ValueError: as `rules.to_params`.
    """
    return rules.to_params(table(config), state_dict, like)
