"""FLOPs of a call, from its trace: nothing is computed, and shapes do for arrays.

Matrix products and convolutions are counted, at 2 FLOPs a multiply-add, and nothing else: norms,
activations, softmax and lookups are below 1 % in the models here. A loop counts its body as often
as it runs (a while loop, whose trips are unknown, once), a conditional its most expensive branch.
Masks are not seen: causal attention counts all pairs of positions, whatever kernel computes it.

Training is counted on the forward pass. There each product c = a b is one; the backward pass has
one more for each operand whose gradient is wanted, because the parameters reach it:

    dL/da = dL/dc b^T        dL/db = a^T dL/dc

So a layer on activations costs 3 products, the first layer on data 2, a frozen network behind the
model 2, one that sees only data 1. Integers and `stop_gradient` end what the parameters reach.
What rematerialisation computes a second time is not part of it: these are FLOPs that the model
needs, not those that a program spends.

Deviation: a product that the loss does not depend on, or not smoothly, such as the distances
behind an argmin, is counted as if it did.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxprs_in_params

ZERO_GRADIENT = {"stop_gradient", "sign", "floor", "ceil", "round"}
"""Primitives through which no gradient passes, though their results are floating-point."""

Counted = tuple[float, list[bool]]
"""FLOPs, and which of the results the parameters reach."""


def flops(function: Callable, *arguments: Any, **options: Any) -> float:
    """FLOPs of `function(*arguments, **options)`.

    Args:
        function: a pure function, jitted or not.
        arguments: trees of arrays or `jax.ShapeDtypeStruct`s; leaves of other types are static.
        options: the same, by name.
    """
    return traced_flops(_trace(function, arguments, options))


def training_flops(loss: Callable, params: Any, *arguments: Any) -> float:
    """FLOPs of `loss(params, *arguments)` and of its gradient with respect to `params`.

    Args:
        loss: a pure function to a scalar, with or without further results.
        params: tree of arrays or `jax.ShapeDtypeStruct`s.
        arguments: as for `flops`; no gradient flows to them.
    """
    jaxpr = _trace(loss, (params, *arguments), {})
    trained = len(jax.tree.leaves(params))
    return _count(jaxpr, [i < trained for i in range(len(jaxpr.invars))])[0]


def traced_flops(jaxpr: Any) -> float:
    """FLOPs of a (closed) jaxpr: if it is a gradient's, what is computed again included."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return _count(jaxpr, [False] * len(jaxpr.invars))[0]


def _trace(function: Callable, arguments: tuple, options: dict[str, Any]) -> Jaxpr:
    """The jaxpr of a call; its inputs are the arrays among the leaves of the arguments."""
    leaves, structure = jax.tree.flatten((arguments, options))
    is_array = [hasattr(leaf, "dtype") for leaf in leaves]

    def call(*arrays: Any) -> Any:
        given = iter(arrays)
        merged = [next(given) if a else leaf for leaf, a in zip(leaves, is_array, strict=True)]
        args, kwargs = structure.unflatten(merged)
        return function(*args, **kwargs)

    arrays = [leaf for leaf, a in zip(leaves, is_array, strict=True) if a]
    return jax.make_jaxpr(call)(*arrays).jaxpr


def _count(jaxpr: Jaxpr, reached: Sequence[bool]) -> Counted:
    """FLOPs of a jaxpr, given which of its inputs the parameters reach."""
    flags = dict(zip(jaxpr.invars, reached, strict=True))

    def flags_of(atoms: Sequence[Any]) -> list[bool]:
        return [not isinstance(atom, Literal) and flags.get(atom, False) for atom in atoms]

    total = 0.0
    for eqn in jaxpr.eqns:
        cost, outputs = _count_equation(eqn, flags_of(eqn.invars))
        total += cost
        for var, output in zip(eqn.outvars, outputs, strict=True):
            flags[var] = output and jnp.issubdtype(_aval(var).dtype, jnp.inexact)
    return total, flags_of(jaxpr.outvars)


def _count_equation(eqn: JaxprEqn, reached: list[bool]) -> Counted:
    inner = list(jaxprs_in_params(eqn.params))
    match eqn.primitive.name:
        case "dot_general" | "conv_general_dilated":
            return _product_flops(eqn) * (1 + sum(reached)), [any(reached)]
        case "scan":
            cost, outputs = _count_loop(inner[0], reached, _carries_of_scan(eqn, inner[0]))
            return eqn.params["length"] * cost, outputs
        case "while":
            first, constants = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
            body = eqn.params["body_jaxpr"].jaxpr
            cost, outputs = _count_loop(body, reached[first:], slice(constants, None))
            return cost + traced_flops(eqn.params["cond_jaxpr"]), outputs
        case "cond":
            counted = [_count(branch, reached[1:]) for branch in inner]
            costs, outputs = zip(*counted, strict=True)
            return max(costs), [any(flags) for flags in zip(*outputs, strict=True)]
        case "pallas_call":  # its body runs at every point of the grid
            body, touched = eqn.params["jaxpr"], any(reached)
            cost, _ = _count(body, [touched] * len(body.invars))
            return math.prod(eqn.params["grid_mapping"].grid) * cost, [touched] * len(eqn.outvars)
        case "shard_map":  # its body is one device's
            cost, outputs = _count(inner[0], reached)
            sizes = eqn.params["mesh"].shape
            return math.prod(sizes[a] for a in eqn.params["newly_manual_axes"]) * cost, outputs
        case name if name.startswith("dot_product_attention_"):
            return _cudnn_attention_flops(eqn, reached), [any(reached)] * len(eqn.outvars)
        case name if name in ZERO_GRADIENT:
            return 0.0, [False] * len(eqn.outvars)
    if len(inner) == 1 and len(inner[0].invars) == len(reached):
        cost, outputs = _count(inner[0], reached)
        if len(outputs) == len(eqn.outvars):
            return cost, outputs
    # Not a plain call: whatever goes in may come out anywhere.
    cost = sum((_count(each, [any(reached)] * len(each.invars))[0] for each in inner), 0.0)
    return cost, [any(reached)] * len(eqn.outvars)


def _carries_of_scan(eqn: JaxprEqn, body: Jaxpr) -> slice:
    """Where the carries stand among the inputs: after the constants, before what is cut in rows.

    Told by the ranks, since versions of JAX name their numbers differently.
    """

    def num_cut(atoms: Sequence[Any], rows: Sequence[Any]) -> int:
        return sum(_aval(a).ndim > _aval(row).ndim for a, row in zip(atoms, rows, strict=True))

    stop = len(body.invars) - num_cut(eqn.invars, body.invars)
    return slice(stop - len(body.outvars) + num_cut(eqn.outvars, body.outvars), stop)


def _count_loop(body: Jaxpr, reached: list[bool], carries: slice) -> Counted:
    """One trip, after as many as it takes until no further carry is reached."""
    reached = list(reached)
    while True:
        cost, outputs = _count(body, reached)
        before = reached[carries]
        after = [a or b for a, b in zip(before, outputs, strict=False)]
        if after == before:
            return cost, outputs
        reached[carries] = after


def _aval(atom: Any) -> Any:
    """Shape and dtype of a value; JAX declares a base class that has none."""
    return atom.aval


def _cudnn_attention_flops(eqn: JaxprEqn, reached: Sequence[bool]) -> float:
    """FLOPs of cuDNN's attention over queries and keys [B, length, heads, head_dim]."""
    q, k = (_aval(var).shape for var in eqn.invars[:2])
    product = 2.0 * math.prod(q) * k[1]
    if "_bwd" in eqn.primitive.name:
        return 5 * product  # the weights again, and the gradients of four operands
    return product * (2 + 4 * any(reached))


def _product_flops(eqn: JaxprEqn) -> float:
    """FLOPs of a matrix product or a convolution."""
    left, right = (_aval(var).shape for var in eqn.invars)
    num_outputs = math.prod(_aval(eqn.outvars[0]).shape)
    numbers = eqn.params["dimension_numbers"]
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = numbers
        return 2.0 * num_outputs * math.prod(left[axis] for axis in contracted)
    depth = math.prod(right) / right[numbers.rhs_spec[0]]
    # The zeros between the elements of a dilated input, as in a strided layer's gradient.
    return 2.0 * num_outputs * depth / math.prod(eqn.params["lhs_dilation"])
