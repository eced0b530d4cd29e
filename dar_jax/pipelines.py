"""The Python API: load a model directory; encode, decode, generate, stream."""

import functools
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dar_jax.common import model_dir
from dar_jax.common.config import build
from dar_jax.common.typing import Any, Array, Float, Int, Params, PRNGKeyArray, PRNGKeys
from dar_jax.models.dar import sampler
from dar_jax.models.dar.llama import Llama, LlamaConfig
from dar_jax.models.dar.tokenizer import Tokenizer, TokenizerConfig
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional import FunctionalModel
from dar_jax.nn.stack import unstack
from dar_jax.sampling.logits import SamplingConfig, guidance_schedule
from dar_jax.training.sharding import fsdp_sharding

Guidance = float | tuple[float, float]
"""One scale for all tokens, or the first and last of a linear ramp; 1 is no guidance."""


class Generated(NamedTuple):
    """`images` float32 [B, H, W, 3] in [-1, 1] (clipped); `indices` int32 [B, N]."""

    images: Array
    indices: Array


class TokenizerPipeline:
    """Images to indices and back."""

    def __init__(
        self,
        model: FunctionalModel[Tokenizer],
        params: Params,
        *,
        class_names: Sequence[str] = (),
    ):
        self.model = model
        self.config: TokenizerConfig = model.config
        self.params = jax.device_put(params)
        self.class_names = tuple(class_names)

    def encode(self, images: Float[Array | np.ndarray, "B H W 3"]) -> Int[Array, "B N"]:
        """Encode images in [-1, 1]; both sides must be multiples of the encoder's patch size.

        Raises:
            ValueError: another shape.
        """
        _check_shape("images", images, ("B", "H", "W", 3))
        return _encode(self.model, self.params, jnp.asarray(images))

    def decode(
        self,
        indices: Int[Array | np.ndarray, "B n"],
        *,
        rng: PRNGKeyArray | None = None,
        noise: Float[Array | np.ndarray, "B H W 3"] | None = None,
        solver: str = "adams_bashforth2",
        num_groups: int | None = None,
        num_steps: int | None = None,
        start_step: int = 0,
        start_image: Float[Array | np.ndarray, "B H W 3"] | None = None,
    ) -> Float[Array, "B H W 3"]:
        """Decode indices to images, nominally in [-1, 1] (not clipped).

        Args:
            indices: all N tokens; with `num_groups`, at least those of the groups.
            rng: key of the initial noise; image i draws from `fold_in(rng, i)`.
            noise: initial noise instead of `rng`; also sets the size.
            solver: "adams_bashforth2" or "euler".
            num_groups: decode from the first groups only: a preview.
            num_steps: denoising steps instead of the model's.
            start_step: first step that is taken.
            start_image: image that the run starts from at `start_step`, noised to its time.

        Raises:
            ValueError: indices out of the codebook, too few or too many of them, no such steps
                or groups, noise or image of another shape, or no `rng` and no `noise`.
        """
        config = self.config
        num_groups = config.num_groups if num_groups is None else num_groups
        num_steps = config.num_steps if num_steps is None else num_steps
        stop_step = _stop_step(config, num_steps, num_groups, start_step)
        _check_indices(indices, config, num_groups)
        if noise is None:
            rngs = image_keys(_require_rng(rng), len(indices))
            noise = sampler.initial_noise(rngs, (config.image_size,) * 2)
        _check_shape("noise", noise, (len(indices), "H", "W", 3))
        if start_image is not None:
            _check_shape("start_image", start_image, noise.shape)
        solution = _decode(
            self.model,
            self.params,
            jnp.asarray(indices),
            jnp.asarray(noise),
            solver=solver,
            num_steps=num_steps,
            start_step=start_step,
            stop_step=stop_step,
            start_image=start_image,
        )
        return solution.x if stop_step == num_steps else solution.previews[-1]


class PriorPipeline:
    """Class labels (or captions) to indices."""

    def __init__(self, model: FunctionalModel[Llama], params: Params):
        self.model = model
        self.config: LlamaConfig = model.config
        self.params = jax.device_put(params)

    @functools.cached_property
    def unstacked_params(self) -> Params:
        """Per-layer parameters in the compute dtype, made once: what decoding reads."""
        cast = jax.tree.map(lambda leaf: leaf.astype(self.model.compute.dtype), self.params)
        return unstack(cast)

    def logits(
        self, labels: Array | np.ndarray, indices: Int[Array | np.ndarray, "B n"]
    ) -> Float[Array, "B n V"]:
        """Teacher-forced logits: position i predicts token i from the tokens before it.

        Args:
            labels: class labels [B] in 0 .. num_classes, or captions [B, T, F].
            indices: image tokens; the last one is not looked at.

        Raises:
            ValueError: a label or token out of range, or captions of another shape.
        """
        labels = check_labels(labels, self.config)
        _check_range("indices", indices, self.config.vocab_size)
        return _logits(self.model, self.params, labels, jnp.asarray(indices))

    def generate_indices(
        self,
        labels: Array | np.ndarray,
        *,
        rng: PRNGKeyArray | None = None,
        guidance_scale: Guidance = 1.0,
        guidance_interval: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        prefix: Int[Array | np.ndarray, "B K"] | None = None,
        caption_mask: Array | np.ndarray | None = None,
    ) -> Int[Array, "B N"]:
        """Generate all tokens of one image per label.

        Args:
            labels: class labels [B], or captions [B, T, F].
            rng: key; image i draws from `fold_in(rng, i)`. Not needed at temperature 0.
            guidance_scale: see `Guidance`.
            guidance_interval: see `sampling.logits.guidance_schedule`.
            temperature: 0 is greedy.
            top_k: 0 is off.
            top_p: 1 is off.
            prefix: first tokens, kept as they are.
            caption_mask: False for padded caption tokens [B, T].
        """
        config = self.config
        labels = check_labels(labels, config)
        groups = sampler.generate_indices(
            self.model.unstacked(),
            self.unstacked_params,
            labels,
            _keys(rng, len(labels), temperature),
            guidance_schedule(guidance_scale, config.num_tokens, interval=guidance_interval),
            sampling=SamplingConfig(temperature, top_k, top_p),
            prefix=check_prefix(prefix, len(labels), config),
            key_mask=None if caption_mask is None else jnp.asarray(caption_mask),
        )
        return list(groups)[-1]


class DarPipeline:
    """A prior and its tokenizer: class labels to images."""

    def __init__(
        self,
        prior: PriorPipeline,
        tokenizer: TokenizerPipeline,
        *,
        class_names: Sequence[str] = (),
    ):
        self.prior = prior
        self.tokenizer = tokenizer
        self.class_names = tuple(class_names)

    def generate(self, labels: Array | np.ndarray | Sequence[int], **options) -> Generated:
        """Generate one image per label; the options are those of `stream`."""
        for preview in self.stream(labels, **options):
            last = preview
        return Generated(last.images, last.indices)

    def stream(
        self,
        labels: Array | np.ndarray | Sequence[int],
        *,
        rng: PRNGKeyArray,
        guidance_scale: Guidance = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        prefix: Int[Array | np.ndarray, "B K"] | None = None,
        solver: str = "adams_bashforth2",
        first_index: int = 0,
    ) -> Iterator[sampler.Preview]:
        """Yield a preview after every group of tokens; the last one is the image.

        Args:
            labels: class labels [B].
            rng: key; image i depends on `fold_in(rng, first_index + i)` and its label only.
            guidance_scale: see `Guidance`.
            temperature: 0 is greedy.
            top_k: 0 is off.
            top_p: 1 is off.
            prefix: first tokens [B, K], kept as they are: they fix the layout.
            solver: of the flow decoder.
            first_index: of the first image, where a large set is made in batches.

        Raises:
            ValueError: a label, prefix or sampling parameter out of range.
        """
        config = self.prior.config
        labels = check_labels(labels, config)
        previews = sampler.stream(
            self.prior.model.unstacked(),
            self.prior.unstacked_params,
            self.tokenizer.model,
            self.tokenizer.params,
            labels,
            image_keys(_require_rng(rng), len(labels), first_index),
            guidance_schedule(guidance_scale, config.num_tokens),
            sampling=SamplingConfig(temperature, top_k, top_p),
            solver=solver,
            prefix=check_prefix(prefix, len(labels), config),
        )
        for preview in previews:
            yield preview._replace(images=jnp.clip(preview.images, -1.0, 1.0))


Pipeline = TokenizerPipeline | DarPipeline


def from_pretrained(
    path: str | os.PathLike, *, compute: Compute | None = None, mesh: Mesh | None = None
) -> Pipeline:
    """Load a model directory; its kind is read from `config.json`.

    Args:
        path: directory with `config.json` and `model.safetensors` (and a prior's tokenizer), a
            workdir that holds it as `model`, or `hf://owner/name[/directory]`.
        compute: execution choices, e.g. `Compute(dtype="bfloat16")`.
        mesh: spread the parameters over these devices; each one reads only its own part.

    Raises:
        ValueError: no such directory, an unknown kind, or weights that do not fit the config.
    """
    directory = model_dir.locate(path)
    loaded = model_dir.load_config(directory)
    class_names = loaded.get("class_names", ())
    match loaded["kind"]:
        case "dar_tokenizer":
            loaded_model = _load(Tokenizer, TokenizerConfig, directory, compute, mesh)
            return TokenizerPipeline(*loaded_model, class_names=class_names)
        case "dar_prior":
            nested = model_dir.tokenizer_of(directory)
            prior = PriorPipeline(*_load(Llama, LlamaConfig, directory, compute, mesh))
            tokenizer = from_pretrained(nested, compute=compute, mesh=mesh)
            sampler.check_pair(prior.config, tokenizer.config, str(nested))
            return DarPipeline(prior, tokenizer, class_names=class_names)
        case kind:
            raise ValueError(f"{path}: unknown kind {kind!r}; known: dar_tokenizer, dar_prior")


def _load(
    cls: type, config_class: type, path: os.PathLike, compute: Compute | None, mesh: Mesh | None
) -> tuple[FunctionalModel, Params]:
    config = build(config_class, model_dir.load_config(path)["model"], str(path))
    model = FunctionalModel(cls, config, compute or Compute())
    like = model.abstract_params()
    shardings = None if mesh is None else fsdp_sharding(like, mesh)
    return model, model_dir.load_params(path, like, shardings)


def image_keys(rng: PRNGKeyArray, num_images: int, first: int = 0) -> PRNGKeys:
    """One key per image index, whatever the batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(rng, first + jnp.arange(num_images))


def check_labels(labels: Any, config: LlamaConfig) -> Array:
    """Return labels (or captions) as an array.

    Raises:
        ValueError: another shape, or a label that is no class.
    """
    labels = jnp.asarray(labels)
    if config.caption_dim is None:
        _check_shape("labels", labels, ("B",))
        _check_range("labels", labels, config.num_classes + 1)
    else:
        _check_shape("captions", labels, ("B", config.condition_tokens, config.caption_dim))
    return labels


def check_prefix(prefix: Any, batch_size: int, config: LlamaConfig) -> Array | None:
    """Return the prefix as an array.

    Raises:
        ValueError: another batch size, N or more tokens, or a token out of the codebook.
    """
    if prefix is None:
        return None
    prefix = jnp.asarray(prefix, jnp.int32)
    _check_shape("prefix", prefix, (batch_size, "K"))
    if prefix.shape[1] >= config.num_tokens:
        raise ValueError(
            f"prefix holds {prefix.shape[1]} tokens, expected fewer than {config.num_tokens}"
        )
    _check_range("prefix", prefix, config.vocab_size)
    return prefix


def _check_shape(name: str, array: Any, expected: Sequence[int | str]) -> None:
    """Check every axis against its size; a letter stands for any size."""
    shape = tuple(array.shape)
    fits = len(shape) == len(expected) and all(
        size == wanted or isinstance(wanted, str)
        for size, wanted in zip(shape, expected, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} has shape {shape}, expected ({', '.join(map(str, expected))})")


def _check_indices(indices: Any, config: TokenizerConfig, num_groups: int) -> None:
    """Check [B, n] with the tokens of the groups, and the codebook."""
    _check_shape("indices", indices, ("B", "n"))
    needed = config.num_tokens * num_groups // config.num_groups
    if not needed <= indices.shape[1] <= config.num_tokens:
        raise ValueError(
            f"indices hold {indices.shape[1]} tokens, expected {needed} to {config.num_tokens}"
        )
    _check_range("indices", indices, config.codebook_size)


def _stop_step(config: TokenizerConfig, num_steps: int, num_groups: int, start_step: int) -> int:
    """Return the number of steps that the groups suffice for, if any are left to take."""
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1")
    stop_step = sampler.steps_of_groups(config, num_steps, num_groups)
    last = num_steps if stop_step == num_steps else stop_step - 1
    if not 0 <= start_step <= last:
        raise ValueError(f"start_step={start_step} must be in 0..{last}")
    return stop_step


def _check_range(name: str, values: Any, stop: int) -> None:
    values = np.asarray(values)
    wrong = values[(values < 0) | (values >= stop)]
    if wrong.size:
        raise ValueError(f"{name}: {wrong.flat[0]} is out of range, expected 0..{stop - 1}")


def _require_rng(rng: PRNGKeyArray | None) -> PRNGKeyArray:
    if rng is None:
        raise ValueError("rng is missing: pass rng=jax.random.key(seed)")
    return rng


def _keys(rng: PRNGKeyArray | None, num_images: int, temperature: float) -> PRNGKeys:
    # Greedy decoding draws nothing.
    rng = jax.random.key(0) if temperature == 0 and rng is None else _require_rng(rng)
    return image_keys(rng, num_images)


@functools.partial(jax.jit, static_argnames="model")
def _encode(model: FunctionalModel[Tokenizer], params: Params, images: Array) -> Array:
    return model.bind(params).encode(images).indices


@functools.partial(
    jax.jit, static_argnames=("model", "solver", "num_steps", "start_step", "stop_step")
)
def _decode(model, params, indices, noise, **options):
    return sampler.decode_indices(model, params, indices, noise, **options)


@functools.partial(jax.jit, static_argnames="model")
def _logits(model: FunctionalModel[Llama], params: Params, labels: Array, indices: Array) -> Array:
    logits = model.bind(params).logits(labels, indices[:, :-1])
    return logits[:, model.config.condition_tokens - 1 :]
