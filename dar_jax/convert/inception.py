"""Weights of FID's Inception network under the names of its PyTorch port, to a model directory.

pytorch-fid's `pt_inception-2015-12-05-6726825d.pth` and torch-fidelity's
`weights-inception-2015-12-05-6726825d.pth` share their names, which are ours in lower case:
`Mixed_5b.branch5x5_1.conv.weight`, `Mixed_5b.branch5x5_1.bn.running_mean`.
"""

from collections.abc import Mapping
from typing import Any

from dar_jax.common.typing import Params
from dar_jax.convert import rules
from dar_jax.models.frozen.inception import InceptionConfig

UNUSED_KEYS = ("fc.bias", "*.num_batches_tracked")
"""The Inception score takes logits without their bias; counters."""


def table(config: InceptionConfig) -> tuple[rules.Rule, ...]:
    """Conversion table of `models.frozen.inception.Inception`."""
    result = rules.linear("fc", "logits", bias=False)
    for name in config.conv_names():
        reference = name[0].upper() + name[1:].replace("/", ".")
        result += rules.under(reference, name, NORMED_CONV)
    return result


NORMED_CONV = (
    *rules.conv("conv", "conv", bias=False),
    *rules.tensor("bn.weight", "scale"),
    *rules.tensor("bn.bias", "bias"),
    *rules.tensor("bn.running_mean", "mean"),
    *rules.tensor("bn.running_var", "variance"),
)


def from_reference(state_dict: Mapping[str, Any], config: InceptionConfig, like: Params) -> Params:
    """Convert the weights to the structure of `like` (possibly abstract).

    Raises:
        ValueError: as `rules.to_params`.
    """
    return rules.to_params(table(config), state_dict, like, ignored=UNUSED_KEYS)
