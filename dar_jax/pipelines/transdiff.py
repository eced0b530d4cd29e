"""TransDiff: class labels to latents, and through the VAE to images."""

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.common.checks import check_labels, check_microbatch, check_shape
from dar_jax.common.keys import image_keys
from dar_jax.common.pictures import Images
from dar_jax.common.typing import Any, Array, Float, PRNGKeyArray
from dar_jax.models.transdiff import sampler, search
from dar_jax.models.transdiff.model import TransDiff, TransDiffConfig
from dar_jax.models.transdiff.options import TransDiffSampling
from dar_jax.pipelines.base import (
    Labels,
    ModelPipeline,
    Pipeline,
    last_of,
)
from dar_jax.pipelines.kl_vae import KlVaePipeline
from dar_jax.pipelines.options import takes_options
from dar_jax.sampling.rewards import load_reward
from dar_jax.sampling.search import candidate_keys, survivors


class LatentPipeline(ModelPipeline[TransDiff]):
    """Class labels to latents."""

    config: TransDiffConfig

    def sample_latents(
        self,
        labels: Array | np.ndarray | Sequence[int],
        *,
        rng: PRNGKeyArray | int | None = None,
        noise: Float[Array | np.ndarray, "B h w C"] | None = None,
        step_noise: Float[Array | np.ndarray, "*passes steps B h w C"] | None = None,
        sampling: TransDiffSampling = TransDiffSampling(),
        **options: Any,
    ) -> Float[Array, "B h w C"]:
        """Draw one latent per label with the stochastic solver, scaled as the model is trained.

        Args:
            labels: classes in 0 .. num_classes (the null class).
            rng: key or seed of the noise; image i draws from `fold_in(rng, i)`.
            noise: initial noise instead of `rng`.
            step_noise: noise of the num_steps - 1 stochastic steps instead of `rng`; an MRAR model
                takes it for each of its passes.
            sampling: how they are drawn.
            **options: fields of `TransDiffSampling`, e.g. num_steps=50, guidance_scale=1.3.

        Raises:
            ValueError: an argument out of range, noise of another shape, or neither it nor `rng`.
        """
        sampling = dataclasses.replace(sampling, **options)
        if sampling.search.method:
            raise ValueError("search needs the pictures of an autoencoder: use TransDiffPipeline")
        config, size, num_steps = self.config, len(labels), sampling.num_steps
        latent = (size, config.latent_size, config.latent_size, config.channels)
        if noise is None or step_noise is None:
            rngs = self.put(image_keys(rng, size))
            noise = sampler.initial_noise(rngs, config) if noise is None else noise
            step_noise = rngs if step_noise is None else step_noise
        check_shape("noise", noise, latent)
        if not isinstance(step_noise, jax.Array) or step_noise.ndim > 1:
            step_noise = jnp.asarray(step_noise)
            step_noise = step_noise[None] if step_noise.ndim == 5 else step_noise
            check_shape("step_noise", step_noise, (config.num_references, num_steps - 1, *latent))
        return last_of(self.run(labels, self.put(noise), step_noise, sampling)).latents

    def run(
        self,
        labels: Array | np.ndarray | Sequence[int],
        noise: Array,
        step_noise: Array,
        sampling: TransDiffSampling,
        *,
        stops: Sequence[int] = (),
    ) -> Generator[sampler.LatentPreview, Array | None, None]:
        """Check the labels, then run `models.transdiff.sampler.run`.

        Raises:
            ValueError: a label is not a class, or the guidance scales do not fit the model.
        """
        labels = np.asarray(check_labels(labels, self.config.num_classes, null=True))
        sampling.check(self.config)
        return sampler.run(
            self.model,
            self.sampling_params,
            self.put(labels.astype(np.int32)),
            noise,
            step_noise,
            sampling,
            stops=stops,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class TransDiffPreview(Images):
    """An image on its way, or done.

    Attributes:
        step: steps taken, of all passes.
        images: float32 [B, H, W, 3], clipped to [-1, 1].
        latents: float32 [B, h, w, C], scaled.
    """

    step: int
    images: Array
    latents: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class GeneratedLatents(Images):
    """`images` float32 [B, H, W, 3] in [-1, 1] (clipped); `latents` float32 [B, h, w, C]."""

    images: Array
    latents: Array


class TransDiffPipeline(Pipeline):
    """A model of latents and its autoencoder."""

    sampling_class = TransDiffSampling
    generated_class = GeneratedLatents
    prior: LatentPipeline

    def __init__(
        self, prior: LatentPipeline, vae: KlVaePipeline, *, class_names: Sequence[str] = ()
    ):
        super().__init__(prior, class_names)
        self.vae = vae

    @property
    def autoencoder(self) -> KlVaePipeline:
        return self.vae

    @property
    def image_size(self) -> int:
        return self.prior.config.latent_size * self.vae.config.stride

    def settings(self, sampling: TransDiffSampling) -> dict[str, Any]:
        return {**super().settings(sampling), **sampling.search.content()}

    def log_likelihood(self, *inputs: Any, **options: Any) -> NoReturn:
        """Raise ValueError: there is none."""
        raise ValueError(
            "TransDiff draws latents by diffusion: images have no likelihood and no posterior over "
            "classes; use a D-AR model"
        )

    class_log_likelihoods = classify = log_likelihood

    @takes_options(TransDiffSampling)
    def stream(
        self,
        labels: Labels,
        *,
        rng: PRNGKeyArray | int,
        sampling: TransDiffSampling | None = None,
        preview_every: int | None = None,
        previews: bool = True,
        microbatch: int | None = None,
        first_index: int = 0,
        **options: Any,
    ) -> Iterator[TransDiffPreview]:
        """Return images on their way; the last one is the image.

        A preview decodes the latent that the velocity of its step points to; one at the end of a
        pass is that pass's image.

        Args:
            labels: classes by index or name, [B] or one of them.
            rng: key or seed; image i depends on `fold_in(rng, first_index + i)` and its label only.
            sampling: how they are drawn, instead of as the model is best used.
            preview_every: steps between two previews; None is a quarter of a one-step model's, and
                the passes of an MRAR model. A search shows what it judges, and takes None.
            previews: False leaves all but the image out.
            microbatch: images that the autoencoder sees at a time, a divisor of B.
            first_index: of the first image, where a large set is made in batches.

        Raises:
            ValueError: a label or option out of range, or a batch that does not divide over the
                mesh; at the call, not at the first preview.
        """
        config = self.prior.config
        how = self.options(sampling, options)
        num_steps, method = how.num_steps, how.search.method
        classes = check_labels(self.class_indices(labels), config.num_classes)
        if preview_every is not None and (preview_every < 1 or method):
            least = f"None, with search.method={method!r}" if method else "at least 1"
            raise ValueError(f"preview_every={preview_every} must be {least}")
        how.check(config)
        microbatch = check_microbatch(microbatch, len(classes), how.search.num)
        rngs = self.prior.put(image_keys(rng, len(classes), first_index))
        if method:
            kept = self._search(np.asarray(classes), rngs, how, microbatch=microbatch)
            return kept if previews else map(last_of, (kept,))
        every = preview_every or sampler.steps_per_preview(config, num_steps)
        stops = range(every, num_steps, every) if previews else ()
        noise = sampler.initial_noise(rngs, config)
        run = self.prior.run(classes, noise, rngs, how, stops=stops)
        return self._decode(run, num_steps, previews=previews, microbatch=microbatch)

    def _search(
        self, classes: np.ndarray, rngs: Array, how: TransDiffSampling, *, microbatch: int | None
    ) -> Generator[TransDiffPreview, None, None]:
        """Return the previews of what is kept, with "end" and "smc" the image only."""
        config, num = self.prior.config, how.search.num
        judge, classes = load_reward(how.search.reward), np.repeat(classes, num)
        own, labels = self.prior.put((candidate_keys(rngs, num), classes))
        noise, stops = sampler.initial_noise(own, config), search.stops(how, config)
        run = self.prior.run(classes, noise, own, how, stops=stops)
        previews = how.search.method != "end"
        drawn = self._decode(run, how.num_steps, previews=previews, microbatch=microbatch)
        return survivors(
            drawn,
            lambda preview: judge(preview.images, labels),
            how.search,
            rngs,
            num_groups=search.num_judged(how, config),
        )

    @takes_options(TransDiffSampling, like=stream, without=["previews", "preview_every"])
    def generate(self, labels: Labels, **options: Any) -> GeneratedLatents:
        """Generate one image per label: the last one of `stream`, without previews.

            out = transdiff.generate([3, 1, 4], rng=0)
            out.save("grid.png")

        Batches of up to 32 images share six programs: they are padded to powers of two. More than
        `batch_size` are drawn in turns. What the model draws must be finite.

        Returns:
            `images`, float32 [B, H, W, 3] in [-1, 1], and `latents`; with `to_pil()`, `grid()` and
            `save(path)`.
        """
        return super().generate(labels, **options)

    def _decode(
        self,
        run: Generator[sampler.LatentPreview, Array | None, None],
        num_steps: int,
        *,
        previews: bool,
        microbatch: int | None,
    ) -> Generator[TransDiffPreview, Array | None, None]:
        """Decode latents; what is sent back is sent on."""
        total, parents = num_steps * self.prior.config.num_references, None
        while True:
            try:
                progress = run.send(parents)
            except StopIteration:
                return
            step, parents = progress.step_pass * num_steps + progress.step, None
            if previews or step == total:
                images = sampler.decode(
                    self.vae.model, self.vae.params, progress.latents, microbatch=microbatch
                )
                parents = yield TransDiffPreview(step, images, progress.latents)
