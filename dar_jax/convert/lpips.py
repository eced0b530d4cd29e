"""LPIPS weights under their published names (`net.slice1.0.weight`, `lin0.model.1.weight`).

Convolutions keep their numbers in torchvision's VGG-16 feature stack, where a convolution and its
ReLU take two and a max pooling one.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dar_jax.common.typing import Params
from dar_jax.convert import rules
from dar_jax.models.frozen.lpips import SCALE, SHIFT, LpipsConfig

HEAD = rules.axes("1 c 1 1 -> c")
CONSTANTS = {"scaling_layer.shift": SHIFT, "scaling_layer.scale": SCALE}


def table(config: LpipsConfig) -> tuple[rules.Rule, ...]:
    """Conversion table of `models.frozen.lpips.Lpips`."""
    result = []
    number = 0
    for i, widths in enumerate(config.stages):
        for j in range(len(widths)):
            result += rules.conv(f"net.slice{i + 1}.{number}", f"stages/{i}/{j}")
            number += 2
        number += 1
        result += rules.tensor(f"lin{i}.model.1.weight", f"heads/{i}", HEAD)
    return tuple(result)


def from_reference(state_dict: Mapping[str, Any], config: LpipsConfig, like: Params) -> Params:
    """Convert LPIPS weights.

    Args:
        state_dict: arrays under the reference's names.
        config: size of the network.
        like: parameters (possibly abstract) of `Lpips`.

    Raises:
        ValueError: as `rules.to_params`; or the state dict scales its input otherwise.
    """
    for name, expected in CONSTANTS.items():
        found = np.ravel(state_dict.get(name, expected))
        if not np.allclose(found, expected):
            raise ValueError(f"{name} is {found.tolist()}, this model uses {list(expected)}")
    return rules.to_params(table(config), state_dict, like, ignored=tuple(CONSTANTS))
