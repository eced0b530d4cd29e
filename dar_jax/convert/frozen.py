"""Published weights of the networks in losses and evaluation, to model directories.

net            source
dinov2         a file of the DINOv2 repository, timm or HF transformers; S, B or L
lpips_vgg16    a state dict of all of LPIPS; or torchvision's classifier and the file of the
lpips_alexnet  heads, `vgg16-397923af.pth,vgg.pth`
inception      `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid, or torch-fidelity's file
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dar_jax.common.typing import Params
from dar_jax.convert import dinov2, inception, lpips
from dar_jax.models.frozen.dinov2 import Dinov2
from dar_jax.models.frozen.inception import Inception, InceptionConfig
from dar_jax.models.frozen.lpips import NETWORKS, Lpips
from dar_jax.models.frozen.pretrained import (
    DINOV2_KIND,
    INCEPTION_GRAPH,
    INCEPTION_KIND,
    LPIPS_KIND,
)
from dar_jax.nn.functional_model import FunctionalModel

LPIPS_PREFIX = f"{LPIPS_KIND}_"
NETS = (DINOV2_KIND, *(f"{LPIPS_PREFIX}{network}" for network in NETWORKS), INCEPTION_KIND)


def from_reference(net: str, state_dict: Mapping[str, Any]) -> tuple[str, dict[str, Any], Params]:
    """Convert weights to what `model_dir.save_model` takes: kind, model config and parameters.

    Args:
        net: one of `NETS`.
        state_dict: arrays under the published names.

    Raises:
        ValueError: the state dict does not fit the network.
    """
    if net == DINOV2_KIND:
        config = dinov2.config_of(state_dict)
        like = FunctionalModel(Dinov2, config).abstract_params()
        params = dinov2.from_reference(state_dict, config, like)
        return DINOV2_KIND, dataclasses.asdict(config), params
    if net == INCEPTION_KIND:
        config = InceptionConfig()
        like = FunctionalModel(Inception, config).abstract_params()
        params = inception.from_reference(state_dict, config, like)
        return INCEPTION_KIND, {"graph": INCEPTION_GRAPH}, params
    network = net.removeprefix(LPIPS_PREFIX)
    config = NETWORKS[network]
    like = FunctionalModel(Lpips, config).abstract_params()
    params = lpips.from_reference(state_dict, config, like)
    return LPIPS_KIND, {"network": network}, params
