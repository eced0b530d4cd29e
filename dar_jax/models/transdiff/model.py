"""TransDiff (arXiv:2506.09482): a transformer makes condition tokens from the class, and a
diffusion decoder turns noise into a latent that attends to them.

With `num_references` > 1 (multi-reference autoregression, MRAR), images of one class are generated
in turn: image k is conditioned on the class and on the k images before it. The encoder's sequence
is [buffer: the class, repeated] [mask tokens] [reference 0] [reference 1] ..., block-causal: a
token sees its own and all earlier blocks. What comes out of the first k + 1 blocks after the buffer
is the condition of image k. The one-step model is the case without references; its sequence is not
masked, and all its mask tokens are one vector.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from dar_jax.common.checks import check_positive, check_rates
from dar_jax.common.typing import Any, Array, Bool, Float, Int, PRNGKeyArray
from dar_jax.models.transdiff.decoder import EMBEDDING_INIT, DiffusionDecoder
from dar_jax.nn.compute import Compute
from dar_jax.nn.layers import XAVIER_INIT, affine_layer_norm, linear
from dar_jax.nn.patch import patchify
from dar_jax.nn.stack import Stack
from dar_jax.nn.transformer import BranchConfig, PlainBlock


@dataclasses.dataclass(frozen=True)
class TransDiffConfig:
    """Defaults are those of the one-step TransDiff-L at 256 pixels (683M parameters).

    Attributes:
        latent_size: rows and columns of a latent.
        channels: of a latent.
        num_classes: class labels; the label `num_classes` is the null class. 0, in a config file
            only, stands for the number of classes of the data.
        num_references: images of a class that are generated in turn; 1 is the one-step model.
        reference_patch_size: side of the patches of a reference in latent pixels. The one-step
            model holds the projection too, without use, as released weights do.
        condition_tokens: of all references together.
        buffer_size: tokens that hold the class.
        dim: width of both transformers.
        num_heads: attention heads of both.
        mlp_ratio: width of the MLPs over `dim`.
        encoder_depth: blocks of the encoder.
        decoder_depth: blocks of the decoder.
        attention_dropout: on attention weights.
        dropout: on the outputs of attention, of the activation and of the MLP.
        label_dropout: probability of training on the null class.
    """

    latent_size: int = 16
    channels: int = 16
    num_classes: int = 1000
    num_references: int = 1
    reference_patch_size: int = 1
    condition_tokens: int = 256
    buffer_size: int = 64
    dim: int = 1024
    num_heads: int = 16
    mlp_ratio: float = 4.0
    encoder_depth: int = 32
    decoder_depth: int = 16
    attention_dropout: float = 0.1
    dropout: float = 0.1
    label_dropout: float = 0.1

    def __post_init__(self):
        check_rates(self, "attention_dropout", "dropout")
        check_positive(self, "mlp_ratio")
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"label_dropout={self.label_dropout} must be in [0, 1]")
        if self.dim % self.num_heads:
            raise ValueError(f"dim={self.dim} must be a multiple of num_heads={self.num_heads}")
        if self.latent_size % self.reference_patch_size:
            raise ValueError(
                f"latent_size={self.latent_size} must be a multiple of "
                f"reference_patch_size={self.reference_patch_size}"
            )
        tokens = (self.latent_size // self.reference_patch_size) ** 2
        if self.num_references > 1 and self.condition_tokens != self.num_references * tokens:
            raise ValueError(
                f"condition_tokens={self.condition_tokens} must be num_references="
                f"{self.num_references} times {tokens} tokens of a latent of "
                f"{self.latent_size}x{self.latent_size}; there is no such model for 512 pixels"
            )

    @property
    def tokens_per_image(self) -> int:
        """Condition tokens of one image."""
        return self.condition_tokens // self.num_references

    @property
    def branches(self) -> BranchConfig:
        return BranchConfig(
            self.dim,
            self.num_heads,
            int(self.dim * self.mlp_ratio),
            self.attention_dropout,
            self.dropout,
        )


def _size(encoder_depth: int, decoder_depth: int, num_heads: int, dim: int) -> dict[str, int]:
    return dict(
        encoder_depth=encoder_depth, decoder_depth=decoder_depth, num_heads=num_heads, dim=dim
    )


SIZES = {"b": _size(24, 12, 12, 768), "l": _size(32, 16, 16, 1024), "h": _size(40, 20, 16, 1280)}
"""Named sizes of the reference."""
MRAR = dict(num_references=4, reference_patch_size=2)
AT_512_PIXELS = dict(latent_size=32)


class ConditionEncoder(nnx.Module):
    """Class and references to condition tokens."""

    def __init__(self, config: TransDiffConfig, *, compute: Compute, rngs: nnx.Rngs):
        self.config = config
        dim = config.dim
        options: dict[str, Any] = dict(compute=compute, rngs=rngs)
        patch_dim = config.channels * config.reference_patch_size**2
        num_mask_tokens = 1 if config.num_references == 1 else config.tokens_per_image

        def table(rows: int) -> nnx.Param:
            return nnx.Param(EMBEDDING_INIT(rngs.params(), (rows, dim)))

        self.class_table = table(config.num_classes)
        # Apart from the classes, as in the reference, so that a tensor there is one here.
        self.null_class = table(1)
        self.mask_token = table(num_mask_tokens)
        self.position_table = table(config.buffer_size + config.condition_tokens)
        self.condition_position_table = table(config.condition_tokens)
        self.reference_projection = linear(patch_dim, dim, kernel_init=XAVIER_INIT, **options)
        self.input_norm = affine_layer_norm(dim, rngs=rngs)
        self.stack = Stack(
            lambda block_rngs: PlainBlock(config.branches, compute=compute, rngs=block_rngs),
            config.encoder_depth,
            **options,
        )
        self.norm = affine_layer_norm(dim, rngs=rngs)
        self.residual_dtype = compute.residual_jnp_dtype

    def __call__(
        self,
        labels: Int[Array, " B"],
        references: Float[Array, "B k h w C"],
        *,
        rng: PRNGKeyArray | None = None,
    ) -> Float[Array, "B M D"]:
        """Return the condition tokens of the images 0 .. k, to which `place` adds the positions.

        Args:
            labels: in 0 .. num_classes (the null class).
            references: latents of the images 0 .. k - 1.
            rng: turns dropout on.
        """
        mask = None if self.config.num_references == 1 else self.mask(references.shape[1])
        tokens = self.stack(self.embed(labels, references), mask, rng=rng)
        return self.norm(tokens[:, self.config.buffer_size :])

    def place(self, tokens: Float[Array, "B M D"]) -> Float[Array, "B M D"]:
        """Add the positions to condition tokens."""
        return tokens + self.condition_position_table[: tokens.shape[1]]

    def embed(
        self, labels: Int[Array, " B"], references: Float[Array, "B k h w C"]
    ) -> Float[Array, "B N D"]:
        """Return the input of the first block."""
        config, batch_size = self.config, len(labels)
        classes = jnp.concatenate([self.class_table[...], self.null_class[...]])[labels]
        parts = [
            jnp.repeat(classes[:, None], config.buffer_size, axis=1),
            jnp.broadcast_to(
                self.mask_token[...], (batch_size, config.tokens_per_image, config.dim)
            ),
        ]
        for reference in jnp.unstack(references, axis=1):
            patches = patchify(reference, config.reference_patch_size)
            parts.append(self.reference_projection(patches))
        tokens = jnp.concatenate(parts, axis=1)
        tokens = self.input_norm(tokens + self.position_table[: tokens.shape[1]])
        return tokens.astype(self.residual_dtype)

    def mask(self, num_references: int) -> Bool[Array, "N N"]:
        """True where a token may attend: to its own block and the earlier ones."""
        sizes = [self.config.buffer_size] + [self.config.tokens_per_image] * (1 + num_references)
        block = jnp.repeat(jnp.arange(len(sizes)), jnp.array(sizes), total_repeat_length=sum(sizes))
        return block[:, None] >= block


class TransDiff(nnx.Module):
    """Encoder and diffusion decoder: `condition`, `decoder.keys_values`, `decoder.velocity`."""

    def __init__(self, config: TransDiffConfig, *, rngs: nnx.Rngs, compute: Compute | None = None):
        compute = compute or Compute()
        self.config = config
        self.encoder = ConditionEncoder(config, compute=compute, rngs=rngs)
        self.decoder = DiffusionDecoder(
            config.branches,
            config.decoder_depth,
            latent_size=config.latent_size,
            channels=config.channels,
            compute=compute,
            rngs=rngs,
        )

    def drop_labels(self, labels: Int[Array, " B"], draws: Float[Array, " B"]) -> Int[Array, " B"]:
        """Replace the labels whose uniform draw is below `label_dropout` by the null class."""
        return jnp.where(draws < self.config.label_dropout, self.config.num_classes, labels)

    def condition(
        self,
        labels: Int[Array, " B"],
        references: Float[Array, "B k h w C"] | None = None,
        *,
        rng: PRNGKeyArray | None = None,
    ) -> Float[Array, "B M D"]:
        """Return the condition tokens of the images 0 .. k of every class."""
        config = self.config
        if references is None:
            shape = (len(labels), 0, config.latent_size, config.latent_size, config.channels)
            references = jnp.zeros(shape)
        return self.encoder.place(self.encoder(labels, references, rng=rng))

    def prefix_mask(self, copies: int) -> Bool[Array, "S M"]:
        """Mask of the cross-attention where all images of a class are trained on at once.

        Rows are [image, copy, token]; image k attends to the condition tokens of images 0 .. k.
        """
        config = self.config
        image_of_token = jnp.arange(config.condition_tokens) // config.tokens_per_image
        image_of_row = jnp.repeat(jnp.arange(config.num_references), copies * config.latent_size**2)
        return image_of_row[:, None] >= image_of_token
