"""Diffusion decoder: velocity of latent tokens that attend to the condition.

Follows the reference's `DiffusionDecoder` (TransDiff, arXiv:2506.09482): a transformer whose blocks
share one time modulation (adaLN-single, Chen et al. 2023, arXiv:2310.00426), each with a table of
its own added to it. Keys and values of the condition do not depend on the time: `keys_values` makes
them once for all steps of a solver.

The reference counts time from 0 (data) to 1000 (noise) and predicts noise - data; `velocity` is
where that is adapted. It casts the input of the time projection to bfloat16 whatever the precision;
here that follows the compute dtype.
"""

import einops
import jax.numpy as jnp
from flax import nnx

from dar_jax.common.typing import Any, Array, Bool, Float, PRNGKeyArray
from dar_jax.nn.adaln import modulate
from dar_jax.nn.attention import KVCache
from dar_jax.nn.compute import Compute
from dar_jax.nn.embeddings import timestep_features
from dar_jax.nn.layers import (
    XAVIER_INIT,
    Mlp,
    affine_layer_norm,
    layer_norm,
    linear,
    silu,
    split_rng,
)
from dar_jax.nn.patch import patchify, unpatchify
from dar_jax.nn.stack import Stack
from dar_jax.nn.transformer import BranchConfig

NUM_MODULATIONS = 6
TIME_FEATURES = 256
EMBEDDING_INIT = nnx.initializers.normal(0.02)


def _modulation_table(rows: int, dim: int, rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(nnx.initializers.normal(dim**-0.5)(rngs.params(), (rows, dim)))


class DecoderBlock(nnx.Module):
    """Self-attention and MLP, shifted, scaled and gated by the time; cross-attention between."""

    def __init__(self, branches: BranchConfig, *, compute: Compute, rngs: nnx.Rngs):
        options = dict(compute=compute, rngs=rngs)
        self.modulation_table = _modulation_table(NUM_MODULATIONS, branches.dim, rngs)
        self.norm1 = affine_layer_norm(branches.dim, rngs=rngs)
        self.attention = branches.attention(**options)
        self.norm2 = affine_layer_norm(branches.dim, rngs=rngs)
        self.cross_attention = branches.attention(qkv_init=XAVIER_INIT, **options)
        self.norm3 = affine_layer_norm(branches.dim, rngs=rngs)
        self.mlp = branches.mlp(**options)

    def __call__(
        self,
        x: Float[Array, "R N D"],
        cache: KVCache,
        modulation: Float[Array, "R six D"],
        mask: Bool[Array, "S M"] | None = None,
        *,
        rng: PRNGKeyArray | None = None,
    ) -> Float[Array, "R N D"]:
        """Apply the block.

        Args:
            x: latent tokens of R = B * copies rows; the copies of an image lie side by side.
            cache: keys and values of the condition of B images.
            modulation: of every row, the same for all blocks.
            mask: True where token n of copy c, in row c * N + n, may attend to the condition.
            rng: turns dropout on.
        """
        rng_self, rng_cross, rng_mlp = split_rng(rng, 3)
        modulation = modulation + self.modulation_table[...]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(
            modulation, NUM_MODULATIONS, axis=1
        )
        h = modulate(self.norm1(x), shift_a, scale_a)
        x = x + (gate_a * self.attention(h, rng=rng_self)).astype(x.dtype)
        # The copies of an image share its condition, so they attend to it as one long sequence.
        h = einops.rearrange(self.norm2(x), "(b c) n d -> b (c n) d", b=len(cache.keys))
        queries = self.cross_attention.queries(h)
        attended = self.cross_attention.attend(queries, cache, mask, rng_cross)
        x = x + einops.rearrange(attended, "b (c n) d -> (b c) n d", n=x.shape[1])
        h = modulate(self.norm3(x), shift_m, scale_m)
        return x + (gate_m * self.mlp(h, rng=rng_mlp)).astype(x.dtype)


class FinalLayer(nnx.Module):
    """Norm without parameters, shifted and scaled by the time, and a linear layer from zero."""

    def __init__(self, dim: int, out_dim: int, *, compute: Compute, rngs: nnx.Rngs):
        self.modulation_table = _modulation_table(2, dim, rngs)
        self.out = linear(
            dim, out_dim, kernel_init=nnx.initializers.zeros, compute=compute, rngs=rngs
        )

    def __call__(self, x: Float[Array, "R N D"], time: Float[Array, "R D"]) -> Array:
        modulation = time[:, None] + self.modulation_table[...]
        shift, scale = jnp.split(modulation, 2, axis=1)
        return self.out(modulate(layer_norm(x), shift, scale))


class DiffusionDecoder(nnx.Module):
    """Velocity field in the space of latents."""

    def __init__(
        self,
        branches: BranchConfig,
        depth: int,
        *,
        latent_size: int,
        channels: int,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        dim = branches.dim
        options: dict[str, Any] = dict(compute=compute, rngs=rngs)
        self.latent_size = latent_size
        self.residual_dtype = compute.residual_jnp_dtype
        self.position_table = nnx.Param(EMBEDDING_INIT(rngs.params(), (latent_size**2, dim)))
        self.token_embed = linear(channels, dim, kernel_init=XAVIER_INIT, **options)
        self.condition_projection = linear(dim, dim, kernel_init=XAVIER_INIT, **options)
        self.time_embed = Mlp(
            TIME_FEATURES, dim, out_dim=dim, kernel_init=XAVIER_INIT, compute=compute, rngs=rngs
        )
        self.modulation = linear(dim, NUM_MODULATIONS * dim, kernel_init=XAVIER_INIT, **options)
        self.stack = Stack(
            lambda block_rngs: DecoderBlock(branches, compute=compute, rngs=block_rngs),
            depth,
            **options,
        )
        self.final_layer = FinalLayer(dim, channels, **options)

    def keys_values(self, condition: Float[Array, "B M D"]) -> KVCache:
        """Return the keys and values of the condition in every block, [depth, B, heads, M, ...]."""
        projected = self.condition_projection(condition)
        return self.stack.each(lambda block: block.cross_attention.keys_values(projected))

    def velocity(
        self,
        x_t: Float[Array, "R h w C"],
        t: Float[Array, " R"],
        caches: KVCache,
        mask: Bool[Array, "S M"] | None = None,
        *,
        rng: PRNGKeyArray | None = None,
    ) -> Float[Array, "R h w C"]:
        """Predict the velocity data - noise at (x_t, t), float32.

        Args:
            x_t: noisy latents of R = B * copies rows; the copies of an image lie side by side.
            t: times in [0, 1], 1 at the data.
            caches: of the condition of B images, see `keys_values`.
            mask: of the cross-attention, see `DecoderBlock`.
            rng: turns dropout on.
        """
        noise_time = 1 - t
        time, modulation = self.embed_time(noise_time)
        x = self.embed(x_t)
        x = self.stack(x, modulation, mask, per_layer=caches, rng=rng)
        tokens = self.final_layer(x, time).astype(jnp.float32)
        return -unpatchify(tokens, 1, (x_t.shape[1], x_t.shape[2]))

    def embed(self, x_t: Float[Array, "R h w C"]) -> Float[Array, "R N D"]:
        """Embed every latent pixel as a token."""
        tokens = self.token_embed(patchify(x_t, 1)) + self.position_table[...]
        return tokens.astype(self.residual_dtype)

    def embed_time(
        self, noise_time: Float[Array, " R"]
    ) -> tuple[Float[Array, "R D"], Float[Array, "R six D"]]:
        """Return the embedding of times counted from the data, and the modulation of the blocks."""
        time = self.time_embed(timestep_features(noise_time, TIME_FEATURES))
        modulation = self.modulation(silu(time))
        return time, einops.rearrange(modulation, "b (six d) -> b six d", six=NUM_MODULATIONS)
