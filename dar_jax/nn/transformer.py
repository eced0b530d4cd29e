"""Pre-norm transformer block with layer scale, as D-AR's encoder and condition layers use it."""

from flax import nnx

from dar_jax.common.typing import Array, Bool, Float
from dar_jax.nn.attention import Attention
from dar_jax.nn.compute import Compute
from dar_jax.nn.layers import Mlp, affine_layer_norm
from dar_jax.nn.rope import Rope

MLP_RATIO = 4


class TransformerBlock(nnx.Module):
    """`x += gate1 * attention(norm1(x)); x += gate2 * mlp(norm2(x))`.

    QK-norm is always on; the gates (layer scale) start at zero.
    """

    def __init__(self, dim: int, num_heads: int, *, compute: Compute, rngs: nnx.Rngs):
        self.norm1 = affine_layer_norm(dim, compute=compute, rngs=rngs)
        self.attention = Attention(dim, num_heads, qk_norm=True, compute=compute, rngs=rngs)
        self.norm2 = affine_layer_norm(dim, compute=compute, rngs=rngs)
        self.mlp = Mlp(dim, MLP_RATIO * dim, compute=compute, rngs=rngs)
        self.gate1 = nnx.Param(nnx.initializers.zeros(rngs.params(), (dim,)))
        self.gate2 = nnx.Param(nnx.initializers.zeros(rngs.params(), (dim,)))

    def __call__(
        self,
        x: Float[Array, "B N D"],
        *,
        rope: Rope | None = None,
        mask: Bool[Array, "N N"] | None = None,
    ) -> Float[Array, "B N D"]:
        attended = self.attention(self.norm1(x), query_rope=rope, key_rope=rope, mask=mask)
        x = x + self.gate1.astype(x.dtype) * attended
        return x + self.gate2.astype(x.dtype) * self.mlp(self.norm2(x))
