"""LPIPS weights under their published names, to a model directory.

Two namings of the trunk are in use, of the same numbers (a convolution and its ReLU take two, a
max pooling one): torchvision's `features.10.weight`, and `net.slice3.10.weight` in state dicts of
the whole of LPIPS. The channel weights are `lin0.model.1.weight` in both worlds; torchvision's file
has to be joined by that of the heads (`lpips/weights/v0.1/{vgg,alex}.pth`).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dar_jax.common.typing import Params
from dar_jax.convert import rules
from dar_jax.models.frozen.lpips import SCALE, SHIFT, LpipsConfig

HEAD = rules.axes("1 c 1 1 -> c")
CONSTANTS = {"scaling_layer.shift": SHIFT, "scaling_layer.scale": SCALE}
UNUSED_KEYS = (*CONSTANTS, "classifier.*", "lins.*")
"""Constants, torchvision's classifier, and the second names that the `lpips` package gives the
heads."""


def table(config: LpipsConfig) -> tuple[rules.Rule, ...]:
    """Conversion table of `models.frozen.lpips.Lpips`."""
    result = []
    number = 0
    for i, stage in enumerate(config.stages):
        number += bool(stage.pool)
        for j in range(len(stage.widths)):
            result += rules.conv(f"net.slice{i + 1}.{number}", f"stages/{i}/{j}")
            number += 2
        result += rules.tensor(f"lin{i}.model.1.weight", f"heads/{i}", HEAD)
    return tuple(result)


def from_reference(state_dict: Mapping[str, Any], config: LpipsConfig, like: Params) -> Params:
    """Convert LPIPS weights.

    Args:
        state_dict: arrays under the reference's names, or torchvision's with the heads'.
        config: the network.
        like: parameters (possibly abstract) of `Lpips`.

    Raises:
        ValueError: as `rules.to_params`; or the state dict scales its input otherwise.
    """
    for name, expected in CONSTANTS.items():
        found = np.ravel(state_dict.get(name, expected))
        if not np.allclose(found, expected):
            raise ValueError(f"{name} is {found.tolist()}, this model uses {list(expected)}")
    conversion = table(config)
    trunk = [rule.reference for rule in conversion if rule.reference.startswith("net.")]
    names = {f"features.{name.split('.', 2)[2]}": name for name in trunk}
    renamed = {names.get(name, name): array for name, array in state_dict.items()}
    return rules.to_params(conversion, renamed, like, ignored=UNUSED_KEYS)
