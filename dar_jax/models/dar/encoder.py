"""Image to 1-D sequence: a ViT with learned queries that are causal among themselves.

D-AR (arXiv:2505.23660), section 3.1; follows the reference's `encoder_layers`. Patches see all
patches and no query; query i sees all patches and the queries 0 .. i, so the queries form an
ordered sequence in which later tokens only refine earlier ones.
"""

import dataclasses

import einops
import jax.numpy as jnp
from flax import nnx

from dar_jax.common.image import RGB
from dar_jax.common.typing import Array, Float
from dar_jax.nn.compute import Compute
from dar_jax.nn.fused_attention import Causal
from dar_jax.nn.layers import FRAMEWORK_INIT, layer_norm, linear
from dar_jax.nn.patch import patchify
from dar_jax.nn.rope import append_identity, rope_2d
from dar_jax.nn.stack import Stack
from dar_jax.nn.transformer import TransformerBlock

LOW_RANK_INIT = nnx.initializers.truncated_normal(1.0)
FULL_RANK_INIT = nnx.initializers.normal(0.02)
"""Of the query table; the low-rank one is cut at two standard deviations, as in the reference."""


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Defaults are the released tokenizer's (v1).

    Attributes:
        patch_size: side of a patch in pixels.
        dim: width.
        depth: number of blocks.
        head_dim: width of one attention head.
        query_rank: width of the query table before its projection; None stores full width.
        rope_base: of the patches' 2-D rotary embedding.
    """

    patch_size: int = 16
    dim: int = 768
    depth: int = 8
    head_dim: int = 64
    query_rank: int | None = 8
    rope_base: float = 10000.0


class Encoder(nnx.Module):
    """[B, H, W, 3] image to [B, num_tokens, code_dim] continuous codes."""

    def __init__(
        self,
        config: EncoderConfig,
        *,
        num_tokens: int,
        max_tokens: int,
        code_dim: int,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.residual_dtype = compute.residual_jnp_dtype
        self.num_tokens = num_tokens
        self.patch_embed = linear(
            RGB * config.patch_size**2,
            config.dim,
            kernel_init=FRAMEWORK_INIT,
            compute=compute,
            rngs=rngs,
        )
        rank = config.query_rank or config.dim
        table_init = LOW_RANK_INIT if config.query_rank else FULL_RANK_INIT
        self.query_table = nnx.Param(table_init(rngs.params(), (max_tokens, rank)))
        self.query_projection = (
            linear(rank, config.dim, kernel_init=FRAMEWORK_INIT, compute=compute, rngs=rngs)
            if config.query_rank
            else None
        )
        self.stack = Stack(
            lambda block_rngs: TransformerBlock(
                config.dim, config.dim // config.head_dim, compute=compute, rngs=block_rngs
            ),
            config.depth,
            compute=compute,
            rngs=rngs,
        )
        self.to_code = linear(
            config.dim,
            code_dim,
            use_bias=False,
            kernel_init=FRAMEWORK_INIT,
            compute=compute,
            rngs=rngs,
        )

    def __call__(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B N C"]:
        """Encode an image in [-1, 1]; its sides must be multiples of the patch size."""
        tokens = self.embed(image)
        rows, columns = (side // self.config.patch_size for side in image.shape[1:3])
        patch_rope = rope_2d(rows, columns, self.config.head_dim, self.config.rope_base)
        rope = append_identity(patch_rope, self.num_tokens)
        tokens = self.stack(tokens, rope=rope, mask=Causal(prefix=rows * columns))
        return self.to_code(layer_norm(tokens[:, -self.num_tokens :]))

    def embed(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B N D"]:
        """Return [normalised patches, queries]; the queries are not normalised."""
        patches = layer_norm(self.patch_embed(patchify(image, self.config.patch_size)))
        queries = einops.repeat(self.queries(), "n d -> b n d", b=len(image))
        return jnp.concatenate([patches, queries], axis=1).astype(self.residual_dtype)

    def queries(self) -> Float[Array, "N D"]:
        """Return the learned queries."""
        queries = self.query_table[: self.num_tokens]
        return queries if self.query_projection is None else self.query_projection(queries)
