"""Repeated blocks: one set of stacked parameters, scanned and optionally rematerialised."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from dar_jax.common.typing import Any, Array, Params, PRNGKeyArray
from dar_jax.nn.compute import Compute
from dar_jax.nn.fused_attention import are_results
from dar_jax.nn.layout import keep_batch_split
from dar_jax.nn.linear import PRODUCT

BLOCKS = "blocks"
"""Path component under which stacked parameters lie; their leading axis is the layer."""


class Stack(nnx.Module):
    """`depth` equal blocks applied in turn.

    With `compute.stacked` the parameters of all blocks are stacked along a leading layer axis and
    the blocks run in a `jax.lax.scan`; otherwise they are a list.
    """

    def __init__(
        self,
        make_block: Callable[[nnx.Rngs], nnx.Module],
        depth: int,
        *,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        self.depth = depth
        self.compute = compute
        keys = jax.random.split(rngs.params(), depth) if depth else ()
        if not depth:
            self.blocks: Any = None
        elif compute.stacked:
            self.blocks = jax.vmap(lambda key: make_block(nnx.Rngs(key)))(keys)
        else:
            self.blocks = nnx.List([make_block(nnx.Rngs(key)) for key in keys])

    def __call__(
        self,
        x: Array,
        *args,
        per_layer: Any = None,
        rng: PRNGKeyArray | None = None,
        start: int = 0,
        stop: int | None = None,
        **kwargs,
    ) -> Array:
        """Apply the blocks `start` to `stop` to x; the other arguments go to every block.

        Args:
            x: input of the first block.
            per_layer: a tree of arrays [depth, ...], e.g. from `each`; every block gets its slices
                as its argument after x. None is no such argument.
            rng: split into one key per block (its keyword argument `rng`); None passes none.
            start: index of the first block that runs.
            stop: index after the last block that runs; None runs to the end.
        """
        layers = range(self.depth)[start:stop]
        if not layers:
            return x
        rngs = None if rng is None else jax.random.split(rng, self.depth)

        def apply(block: nnx.Module, x: Array, own: Any, layer_rng: PRNGKeyArray | None) -> Array:
            randomness = {} if layer_rng is None else {"rng": layer_rng}
            first = () if own is None else (own,)
            return block(x, *first, *args, **kwargs, **randomness)

        if not self.compute.stacked:
            for i in layers:
                own = jax.tree.map(lambda leaf, i=i: leaf[i], (per_layer, rngs))
                x = apply(self.blocks[i], x, *own)
            return x

        graphdef, stacked = nnx.split(self.blocks)
        inputs = (stacked, per_layer, rngs)
        if len(layers) != self.depth:
            inputs = jax.tree.map(lambda leaf: leaf[start:stop], inputs)

        def body(x, layer):
            params, *own = layer
            return apply(nnx.merge(graphdef, params), keep_batch_split(x), *own), None

        body = rematerialised(body, self.compute.remat, in_loop=not self.compute.unroll)
        x, _ = jax.lax.scan(body, x, inputs, unroll=self.compute.unroll)
        return keep_batch_split(x)

    def extend(self, x: Array, caches: Any, *args) -> tuple[Array, Any]:
        """Apply the `extend(x, cache, *args)` of stacked blocks; caches are [depth, ...]."""
        if not self.depth:
            return x, caches
        graphdef, stacked = nnx.split(self.blocks)

        def body(x: Array, layer: Any) -> tuple[Array, Any]:
            params, cache = layer
            return nnx.merge(graphdef, params).extend(x, cache, *args)

        return jax.lax.scan(body, x, (stacked, caches), unroll=self.compute.unroll)

    def each(self, function: Callable[[Any], Any]) -> Any:
        """Apply a function to every block; return the results stacked, [depth, ...]."""
        if not self.compute.stacked:
            results = [function(block) for block in self.blocks]
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)
        graphdef, stacked = nnx.split(self.blocks)
        return jax.vmap(lambda params: function(nnx.merge(graphdef, params)))(stacked)


def rematerialised(body: Callable, policy_name: str, *, in_loop: bool = False) -> Callable:
    """Return `body` with its backward pass recomputing what `Compute.remat` names."""
    match policy_name:
        case "none" | "auto":  # not decided where nothing is trained
            return body
        case "blocks":
            policy = None
        case "dots":
            products = jax.checkpoint_policies.save_only_these_names(PRODUCT)
            policy = jax.checkpoint_policies.save_from_both_policies(products, are_results)
    # prevent_cse is only needed outside of loops.
    return jax.checkpoint(body, prevent_cse=not in_loop, policy=policy)


def unstack(params: Params) -> Params:
    """Split every stacked `blocks` subtree [layers, ...] into one subtree per layer.

    The result fits a model built with `Compute(stacked=False)`. Slicing stacked weights inside a
    decoding loop would copy all of them for every token.
    """
    result = {}
    for name, value in params.items():
        if name == BLOCKS:
            depth = jax.tree.leaves(value)[0].shape[0]
            result[name] = {i: jax.tree.map(lambda leaf, i=i: leaf[i], value) for i in range(depth)}
        else:
            result[name] = unstack(value) if isinstance(value, dict) else value
    return result
