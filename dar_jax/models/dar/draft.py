"""The smaller prior that guesses tokens for another one: the model directory `sample.draft`."""

import functools
import pathlib
from typing import NamedTuple

from dar_jax.common import digests, model_dir
from dar_jax.common.config_build import build, check_sizes
from dar_jax.models.dar.llama import SHARED, LlamaConfig

KIND = "dar_prior"
TOKENIZER = "tokenizer"
TEXTS = ("text_encoder", "text_digest")
"""Of features of captions, where they are known."""


class Draft(NamedTuple):
    """A model directory whose weights are not read yet."""

    directory: pathlib.Path
    config: LlamaConfig


def open_draft(path: str, prior: LlamaConfig) -> Draft:
    """Read the config of a model directory; no weights are read.

    Args:
        path: as `model_dir.locate` takes it.
        prior: the model that it guesses for.

    Raises:
        ValueError: there is no prior in it, or one over other tokens or conditions.
    """
    try:
        directory = _locate(path)
        loaded = model_dir.load_config(directory)
        config = build(LlamaConfig, loaded["model"], str(directory))
        check_sizes(config, str(directory))
    except (OSError, ValueError) as error:  # a name may be too long for the system
        raise ValueError(f"draft={path!r} is no prior that guesses: {error}") from error
    for name in (*SHARED, *TEXTS):
        ours, theirs = getattr(prior, name), getattr(config, name)
        is_known = name not in TEXTS or (ours and theirs)
        if name == "num_classes" and prior.caption_dim is not None:
            is_known = False  # a model of captions has none
        if is_known and ours != theirs:
            raise ValueError(
                f"draft={path!r} has {name}={theirs!r}, but the model that draws has {ours!r}: "
                "name a prior over the same tokens and conditions"
            )
    return Draft(directory, config)


@functools.cache
def check_tokenizer(path: str, own: pathlib.Path | None) -> None:
    """Check that a draft was trained on the codes of a tokenizer, if it says on whose.

    Weights count: what else a config says of a tokenizer, its codes do not depend on.

    Args:
        path: of the draft, which has been opened.
        own: directory of the tokenizer; None: it is not known.

    Raises:
        ValueError: it was trained on those of another one.
    """
    folders = (_locate(path) / TOKENIZER, own)
    weights = [folder / model_dir.WEIGHTS_NAME for folder in folders if folder is not None]
    if not all(file.is_file() for file in weights):
        return
    if len({digests.of_file(file) for file in weights}) > 1:
        raise ValueError(
            f"draft={path!r} was trained on the tokens of another tokenizer than that in {own}: "
            "name a prior of the same one"
        )


@functools.cache
def _locate(path: str) -> pathlib.Path:
    """Find a prior once: a remote one would be asked each time. What fails is not kept."""
    directory = model_dir.locate(path)
    model_dir.load_config(directory, KIND)
    return directory
