"""The Python API: load a model directory; encode, decode, generate, stream."""

import functools
import os
from typing import Any

from jax.sharding import Mesh

from dar_jax.common import model_dir
from dar_jax.common.config_build import build
from dar_jax.common.typing import Params
from dar_jax.models.dar import sampler
from dar_jax.models.dar.llama import Llama, LlamaConfig
from dar_jax.models.dar.tokenizer import Tokenizer, TokenizerConfig
from dar_jax.models.kl_vae import KlVae, KlVaeConfig
from dar_jax.models.transdiff.model import TransDiff, TransDiffConfig
from dar_jax.models.transdiff.sampler import check_vae
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.parallel.sharding import fsdp_sharding
from dar_jax.pipelines.base import Pipeline, image_keys
from dar_jax.pipelines.dar import DarPipeline, Generated, PriorPipeline, TokenizerPipeline
from dar_jax.pipelines.kl_vae import KlVaePipeline
from dar_jax.pipelines.transdiff import LatentPipeline, TransDiffPipeline

__all__ = [
    "DarPipeline",
    "Generated",
    "KlVaePipeline",
    "LatentPipeline",
    "Pipeline",
    "PriorPipeline",
    "TokenizerPipeline",
    "TransDiffPipeline",
    "architecture_of",
    "from_pretrained",
    "image_keys",
]

KINDS = {
    "dar_tokenizer": (TokenizerPipeline, TokenizerConfig),
    "dar_prior": (DarPipeline, LlamaConfig),
    "kl_vae": (KlVaePipeline, KlVaeConfig),
    "transdiff": (TransDiffPipeline, TransDiffConfig),
}
"""Pipeline and architecture by the kind of a model directory."""


def architecture_of(path: str | os.PathLike) -> tuple[type, Any]:
    """Return the class of what `from_pretrained` loads, and the architecture; no weights are read.

    Raises:
        ValueError: no such directory, or an unknown kind.
    """
    directory = model_dir.locate(path)
    loaded = model_dir.load_config(directory)
    kind = loaded["kind"]
    if kind not in KINDS:
        raise ValueError(f"{path}: unknown kind {kind!r}; known: {', '.join(KINDS)}")
    cls, config_class = KINDS[kind]
    return cls, build(config_class, loaded["model"], str(directory))


def from_pretrained(
    path: str | os.PathLike, *, compute: Compute | None = None, mesh: Mesh | None = None
) -> TokenizerPipeline | DarPipeline | KlVaePipeline | TransDiffPipeline:
    """Load a model directory; its kind is read from `config.json`.

    Args:
        path: directory with `config.json` and `model.safetensors` (and a prior's tokenizer), a
            workdir that holds it as `model`, `hf://owner/name[/directory]`, or the digits that
            come with the package, `package://mnist`.
        compute: execution choices, e.g. `Compute(dtype="bfloat16")`.
        mesh: spread parameters and batches over these devices; each one reads its own part only.

    Raises:
        ValueError: no such directory, an unknown kind, or weights that do not fit the config.
    """
    directory = model_dir.locate(path)
    cls, config = architecture_of(directory)
    class_names = model_dir.load_config(directory).get("class_names", ())
    load = functools.partial(_load, directory, config, compute, mesh)
    if cls is TokenizerPipeline:
        return TokenizerPipeline(*load(Tokenizer), class_names=class_names, mesh=mesh)
    if cls is KlVaePipeline:
        return KlVaePipeline(*load(KlVae), class_names=class_names, mesh=mesh)
    if cls is DarPipeline:
        nested = model_dir.tokenizer_of(directory)
        prior = PriorPipeline(*load(Llama), mesh=mesh)
        tokenizer = from_pretrained(nested, compute=compute, mesh=mesh)
        sampler.check_pair(prior.config, tokenizer.config, str(nested))
        return DarPipeline(prior, tokenizer, class_names=class_names)
    nested = model_dir.vae_of(directory)
    latent = LatentPipeline(*load(TransDiff), mesh=mesh)
    vae = from_pretrained(nested, compute=compute, mesh=mesh)
    check_vae(latent.config, vae.config, str(nested))
    return TransDiffPipeline(latent, vae, class_names=class_names)


def _load(
    path: os.PathLike, config: Any, compute: Compute | None, mesh: Mesh | None, cls: type
) -> tuple[FunctionalModel, Params]:
    model = FunctionalModel(cls, config, compute or Compute())
    like = model.abstract_params()
    shardings = None if mesh is None else fsdp_sharding(like, mesh)
    return model, model_dir.load_params(path, like, shardings)
