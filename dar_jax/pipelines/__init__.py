"""The Python API: load a model directory; encode, decode, generate, stream."""

import os

from jax.sharding import Mesh

from dar_jax.common import model_dir
from dar_jax.common.config import build
from dar_jax.common.typing import Params
from dar_jax.models.dar import sampler
from dar_jax.models.dar.llama import Llama, LlamaConfig
from dar_jax.models.dar.tokenizer import Tokenizer, TokenizerConfig
from dar_jax.models.kl_vae import KlVae, KlVaeConfig
from dar_jax.models.transdiff.model import TransDiff, TransDiffConfig
from dar_jax.models.transdiff.sampler import check_vae
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional import FunctionalModel
from dar_jax.pipelines.base import Pipeline, image_keys
from dar_jax.pipelines.dar import DarPipeline, Generated, PriorPipeline, TokenizerPipeline
from dar_jax.pipelines.kl_vae import KlVaePipeline
from dar_jax.pipelines.transdiff import LatentPipeline, TransDiffPipeline
from dar_jax.training.sharding import fsdp_sharding

__all__ = [
    "DarPipeline",
    "Generated",
    "KlVaePipeline",
    "LatentPipeline",
    "Pipeline",
    "PriorPipeline",
    "TokenizerPipeline",
    "TransDiffPipeline",
    "from_pretrained",
    "image_keys",
]

KINDS = ("dar_tokenizer", "dar_prior", "kl_vae", "transdiff")


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
    loaded = model_dir.load_config(directory)
    class_names = loaded.get("class_names", ())
    match loaded["kind"]:
        case "dar_tokenizer":
            loaded_model = _load(Tokenizer, TokenizerConfig, directory, compute, mesh)
            return TokenizerPipeline(*loaded_model, class_names=class_names, mesh=mesh)
        case "dar_prior":
            nested = model_dir.tokenizer_of(directory)
            prior = PriorPipeline(*_load(Llama, LlamaConfig, directory, compute, mesh), mesh=mesh)
            tokenizer = from_pretrained(nested, compute=compute, mesh=mesh)
            sampler.check_pair(prior.config, tokenizer.config, str(nested))
            return DarPipeline(prior, tokenizer, class_names=class_names)
        case "kl_vae":
            loaded_model = _load(KlVae, KlVaeConfig, directory, compute, mesh)
            return KlVaePipeline(*loaded_model, class_names=class_names, mesh=mesh)
        case "transdiff":
            nested = model_dir.vae_of(directory)
            latent = LatentPipeline(
                *_load(TransDiff, TransDiffConfig, directory, compute, mesh), mesh=mesh
            )
            vae = from_pretrained(nested, compute=compute, mesh=mesh)
            check_vae(latent.config, vae.config, str(nested))
            return TransDiffPipeline(latent, vae, class_names=class_names)
        case kind:
            raise ValueError(f"{path}: unknown kind {kind!r}; known: {', '.join(KINDS)}")


def _load(
    cls: type, config_class: type, path: os.PathLike, compute: Compute | None, mesh: Mesh | None
) -> tuple[FunctionalModel, Params]:
    config = build(config_class, model_dir.load_config(path)["model"], str(path))
    model = FunctionalModel(cls, config, compute or Compute())
    like = model.abstract_params()
    shardings = None if mesh is None else fsdp_sharding(like, mesh)
    return model, model_dir.load_params(path, like, shardings)
