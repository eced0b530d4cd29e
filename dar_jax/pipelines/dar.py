"""D-AR: images to tokens and back, labels to tokens, labels to images."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from dar_jax.common.checks import check_finite, check_microbatch, check_shape
from dar_jax.common.image import as_image
from dar_jax.common.keys import image_keys
from dar_jax.common.pictures import Images
from dar_jax.common.typing import Any, Array, Float, Int, Params, PRNGKeyArray, Shaped
from dar_jax.models.dar import sampler, search
from dar_jax.models.dar.draft import check_tokenizer
from dar_jax.models.dar.options import DarSampling, FlowSampling
from dar_jax.models.dar.tokenizer import Tokenizer, TokenizerConfig
from dar_jax.nn.functional_model import FunctionalModel
from dar_jax.pipelines.base import (
    Autoencoder,
    Labels,
    Reconstruction,
    last_of,
)
from dar_jax.pipelines.dar_inputs import (
    check_caption_mask,
    check_condition,
    check_indices,
    check_known,
    check_prefix,
    check_start_image,
    check_steps,
)
from dar_jax.pipelines.dar_likelihood import LikelihoodPipeline
from dar_jax.pipelines.dar_prior import PriorPipeline
from dar_jax.pipelines.dar_prompts import encode_texts
from dar_jax.pipelines.options import takes_options


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Generated(Images):
    """`images` float32 [B, H, W, 3] in [-1, 1] (clipped); `indices` int32 [B, N]."""

    images: Array
    indices: Array


class TokenizerPipeline(Autoencoder[Tokenizer]):
    """Images to indices and back."""

    config: TokenizerConfig
    sampling_class = FlowSampling

    @property
    def codebook_size(self) -> int | None:
        return self.config.codebook_size or None

    def check_image_size(self, image_size: int) -> None:
        if image_size != self.config.image_size:
            raise ValueError(
                f"config.data.image_size={image_size} must be that of the model, "
                f"{self.config.image_size}"
            )
        if 0 < self.config.output_size < image_size:
            raise ValueError(
                f"the model makes images of {self.config.output_size} pixels of those of "
                f"{image_size}, which cannot be compared: set output_size to 0 in its config.json"
            )

    def reconstruct(
        self,
        images: Shaped[Array | np.ndarray, "B H W 3"],
        *,
        rng: PRNGKeyArray | int,
        first_index: int = 0,
        sampling: FlowSampling | None = None,
    ) -> Reconstruction:
        how: FlowSampling = sampling or self.sampling
        tokens = self.encode(images)
        rngs = image_keys(rng, len(images), first_index)
        noise = sampler.initial_noise(rngs, images.shape[1:3])
        num_steps = how.steps(self.config)
        decoded = _decode(  # nothing of it needs the checks of `decode`, which would wait for it
            self.model,
            self.sampling_params,
            tokens,
            self.put(noise),
            solver=how.solver,
            num_steps=num_steps,
            start_step=0,
            stop_step=num_steps,
            start_image=None,
            known=None,
            microbatch=None,
        )
        return Reconstruction(decoded, tokens if self.codebook_size else None)

    def previews(
        self,
        images: Shaped[Array | np.ndarray, "B H W 3"],
        *,
        rng: PRNGKeyArray | int,
        sampling: FlowSampling | None = None,
    ) -> Float[Array, "steps B height width 3"]:
        """Return what every step of `reconstruct` gives."""
        how: FlowSampling = sampling or self.sampling
        tokens = self.encode(images)
        noise = sampler.initial_noise(image_keys(rng, len(images)), images.shape[1:3])
        return _previews(
            self.model,
            self.sampling_params,
            tokens,
            self.put(noise),
            solver=how.solver,
            num_steps=how.steps(self.config),
        )

    def encode(
        self, images: Shaped[Array | np.ndarray, "B H W 3"]
    ) -> Int[Array, "B N"] | Float[Array, "B N C"]:
        """Encode images in [-1, 1], or uint8 pixels.

        Both sides must be multiples of the encoder's patch size.

        In float32, whatever decoding is in. A model without a codebook gives codes.

        Raises:
            ValueError: another shape or type, numbers that are not finite (of NumPy; those of JAX
                are not waited for), or a batch that does not divide over the mesh.
        """
        check_shape("images", images, ("B", "H", "W", 3))
        images = as_image("images", images)
        return _encode(self.model, self.params, self.put(images))

    def between(
        self, ends: Int[Array | np.ndarray, "2 N"], num_images: int
    ) -> Int[Array, "num_images N"]:
        """Return the indices of images on the way from one to another, both of them included.

        Every token is the code nearest to its place on the great circle between its two ends.

        Raises:
            ValueError: fewer than two images, other than two ends, an index that is no code, or a
                model without a codebook.
        """
        if not self.codebook_size:
            return super().between(ends, num_images)
        if num_images < 2:
            raise ValueError(f"num_images={num_images} must be at least 2: both ends are included")
        check_shape("ends", ends, (2, "N"))
        check_indices(ends, self.config, self.config.num_groups)
        return _between(self.model, self.params, ends, np.linspace(0, 1, num_images, dtype="f4"))

    def decode(
        self,
        indices: Shaped[Array | np.ndarray, "B n"] | Float[Array | np.ndarray, "B n C"],
        *,
        rng: PRNGKeyArray | int | None = None,
        noise: Float[Array | np.ndarray, "B H W 3"] | None = None,
        solver: str = "adams_bashforth2",
        num_groups: int | None = None,
        num_steps: int | None = None,
        start_step: int = 0,
        start_image: Shaped[Array | np.ndarray, "B H W 3"] | None = None,
        known: Shaped[Array | np.ndarray, "B H W 3"] | None = None,
        mask: Array | np.ndarray | None = None,
        microbatch: int | None = None,
    ) -> Float[Array, "B height width 3"]:
        """Decode to images in about [-1, 1], as large as the noise or the model's `output_size`.

        Args:
            indices: all N tokens, as `encode` gives them; with `num_groups`, at least those of the
                groups.
            rng: key or seed of the initial noise; image i draws from `fold_in(rng, i)`.
            noise: initial noise instead of `rng`; also sets the size.
            solver: "adams_bashforth2" or "euler".
            num_groups: decode from the first groups only: a preview.
            num_steps: denoising steps instead of the model's.
            start_step: first step that is taken.
            start_image: image that the run starts from at `start_step`, noised to its time.
            known: images whose pixels are kept where `mask` is 1: in-painting.
            mask: [B, H, W] or [H, W], 1 or True where `known` is kept, 0 where it is redrawn.
            microbatch: images decoded at a time, a divisor of B: bounds memory.

        Raises:
            ValueError: indices out of the codebook, too few or too many of them, no such steps
                or groups, noise, image or mask of another shape, no `rng` and no `noise`, or a
                batch that does not divide over the mesh.
        """
        config = self.config
        num_groups = config.num_groups if num_groups is None else num_groups
        num_steps = config.num_steps if num_steps is None else num_steps
        stop_step = check_steps(config, num_steps, num_groups, start_step)
        check_indices(indices, config, num_groups)
        if noise is None:
            noise = self._noise(rng, len(indices))
        else:
            check_finite("noise", noise)
        check_shape("noise", noise, (len(indices), "H", "W", 3))
        start_image = check_start_image(start_image, noise.shape, start_step)
        return _decode(
            self.model,
            self.sampling_params,
            self.put(indices),
            self.put(noise),
            solver=solver,
            num_steps=num_steps,
            start_step=start_step,
            stop_step=stop_step,
            start_image=self.put(start_image),
            known=self.put(check_known(known, mask, noise.shape[:3])),
            microbatch=check_microbatch(microbatch, len(indices)),
        )

    def _noise(self, rng: PRNGKeyArray | int | None, count: int) -> Float[Array, "B H W 3"]:
        rngs = self.put(image_keys(rng, count))
        return sampler.initial_noise(rngs, (self.config.image_size,) * 2)


class DarPipeline(LikelihoodPipeline):
    """A prior and its tokenizer: class labels to images, and their likelihood."""

    sampling_class = DarSampling
    generated_class = Generated
    keeps_tokens = True
    prior: PriorPipeline

    def __init__(
        self,
        prior: PriorPipeline,
        tokenizer: TokenizerPipeline,
        *,
        class_names: Sequence[str] = (),
    ):
        super().__init__(prior, class_names)
        self.tokenizer = tokenizer

    @property
    def autoencoder(self) -> TokenizerPipeline:
        return self.tokenizer

    @property
    def image_size(self) -> int:
        return self.tokenizer.config.image_size

    @property
    def output_size(self) -> int:
        return min(self.image_size, self.tokenizer.config.output_size or self.image_size)

    @property
    def num_tokens(self) -> int:
        return self.tokenizer.config.num_tokens

    def settings(self, sampling: DarSampling) -> dict[str, Any]:
        settings = {**super().settings(sampling), **sampling.search.content()}
        del settings["draft"]  # a set may go on with another one, or without: it draws the same
        return settings

    @takes_options(DarSampling)
    def stream(
        self,
        labels: Labels,
        *,
        rng: PRNGKeyArray | int,
        sampling: DarSampling | None = None,
        prefix: Shaped[Array | np.ndarray, "B K"] | None = None,
        caption_mask: Array | np.ndarray | None = None,
        known: Shaped[Array | np.ndarray, "B H W 3"] | None = None,
        mask: Array | np.ndarray | None = None,
        microbatch: int | None = None,
        first_index: int = 0,
        previews: bool = True,
        **options: Any,
    ) -> Iterator[sampler.DarPreview]:
        """Return the previews after every group of tokens; the last one is the image.

        By the time a preview is handed out, the next group is being decoded. Read it with
        `np.asarray(preview.images)`: further work on the device would queue behind that group.

        The layout of an image lies in its first tokens. `prefix=indices[:, :k]` of images (from
        `tokenizer.encode`) or of an earlier sample keeps it under any label; repeated for several
        rows of one label it draws variations.

        Args:
            labels: classes by index or name, [B] or one of them; or texts, or captions [B, T, F].
            rng: key or seed; image i depends on `fold_in(rng, first_index + i)` and its label only.
            sampling: how they are drawn, instead of as the model is best used.
            prefix: first tokens [B, K], kept as they are: they fix the layout.
            caption_mask: False for padded caption tokens [B, T].
            known: images whose pixels are kept where `mask` is 1: in-painting.
            mask: [B, H, W] or [H, W], 1 or True where `known` is kept, 0 where it is redrawn.
            microbatch: images that the flow decoder sees at a time, a divisor of B.
            first_index: of the first image, where a large set is made in batches.
            previews: False leaves all but the image out.

        Raises:
            ValueError: a label, prefix, mask or sampling parameter out of range, or a batch that
                does not divide over the mesh; at the call, not at the first preview.
        """
        config, size = self.prior.config, self.image_size
        how = self.options(sampling, options)
        how.check(config)
        labels, caption_mask = encode_texts(config, labels, caption_mask)
        condition = check_condition(self.class_indices(labels), config)
        batch_size, put = len(condition), self.prior.put
        caption_mask = check_caption_mask(caption_mask, batch_size, config)
        stream = self._start(
            how.search.method,
            put(condition),
            put(image_keys(rng, batch_size, first_index)),
            how,
            prefix=put(check_prefix(prefix, batch_size, config)),
            key_mask=put(caption_mask),
            draft=self._draft(how, batch_size),
            known=put(check_known(known, mask, (batch_size, size, size))),
            microbatch=check_microbatch(microbatch, batch_size, how.search.num),
        )
        return stream if previews else map(last_of, (stream,))

    def _draft(self, how: DarSampling, batch_size: int) -> Any:
        """See `PriorPipeline.draft`; one of another tokenizer is refused."""
        draft = self.prior.draft(how, batch_size)
        if draft is not None:
            check_tokenizer(str(how.draft), self.tokenizer.directory)
        return draft

    def _start(self, method: str, *inputs: Any, **options: Any) -> Iterator[sampler.DarPreview]:
        """Call `stream` of the sampler, or of a search, with both models."""
        prior, tokenizer = self.prior, self.tokenizer
        inputs = (tokenizer.model, tokenizer.sampling_params, *inputs)
        inputs = (prior.model.unstacked(), prior.sampling_params, *inputs)
        if method:
            return search.stream(*inputs, scorer=(prior.model, prior.params), **options)
        return sampler.stream(*inputs, **options)

    @takes_options(DarSampling, like=stream, without=["previews"])
    def generate(self, labels: Labels, **options: Any) -> Generated:
        """Generate one image per label: the last preview of `stream`.

            out = dar.generate([3, 1, 4], rng=0)
            out.save("grid.png")

        A model of captions takes texts, `["a red apple"]`. Batches of up to 32 images share six
        programs: they are padded to powers of two. More than `batch_size` are drawn in turns. What
        the model draws must be finite.

        Returns:
            `images`, float32 [B, H, W, 3] in [-1, 1], and `indices`, int32 [B, N]; with `to_pil()`,
            `grid()` and `save(path)`.
        """
        config, mask = self.prior.config, options.pop("caption_mask", None)
        labels, mask = encode_texts(config, labels, mask)
        return super().generate(labels, caption_mask=mask, **options)


@functools.partial(jax.jit, static_argnames="model")
def _encode(model: FunctionalModel[Tokenizer], params: Params, images: Array) -> Array:
    with model.in_float32(params) as tokenizer:
        return tokenizer.encode(images).tokens


@functools.partial(jax.jit, static_argnames="model")
def _between(model, params, ends, weights):
    return model.bind(params).quantizer.between(ends, weights)


@functools.partial(
    jax.jit,
    static_argnames=("model", "solver", "num_steps", "start_step", "stop_step", "microbatch"),
)
def _decode(model, params, indices, noise, *, num_steps, stop_step, **options):
    options |= {"num_steps": num_steps, "stop_step": stop_step}
    solution = sampler.decode_indices(model, params, indices, noise, **options)
    return solution.x if stop_step == num_steps else solution.previews[-1]


@functools.partial(jax.jit, static_argnames=("model", "solver", "num_steps"))
def _previews(model, params, indices, noise, **how):
    return sampler.decode_indices(model, params, indices, noise, **how).previews
