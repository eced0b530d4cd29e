"""Tables that map a reference state dict to our parameters, and back.

A `Rule` names one reference tensor, the leaf or leaves of our nested dict that hold it, and a
reversible rearrangement of axes. A converter is a tuple of rules; `to_params` applies it and
`to_state_dict` inverts it, which also renames gradients for parity tests.

A `{i}` in the reference name runs over the layers of a stack: `layers.{i}.norm.weight` is read
for i = 0, 1, ... and becomes one leaf with a leading layer axis. Rearrangements are written for
one layer.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.common import tree
from dar_jax.common.typing import Params

LAYER = "{i}"
MAX_LISTED = 5  # names per kind of problem in an error message


@dataclasses.dataclass(frozen=True)
class Transform:
    """A reversible map between one reference tensor and a tuple of our leaves.

    Both directions must work on NumPy arrays and on tracers, since shapes are found by
    `jax.eval_shape`.
    """

    to_ours: Callable[[Any], tuple[Any, ...]]
    to_reference: Callable[..., Any]


def axes(pattern: str, **sizes: int) -> Transform:
    """Rearrange axes by an einops pattern, read from reference to ours, e.g. `o i -> i o`."""
    reference, ours = pattern.split("->")
    return Transform(
        lambda array: (einops.rearrange(array, pattern, **sizes),),
        lambda array: einops.rearrange(array, f"{ours}->{reference}", **sizes),
    )


def split(sizes: Sequence[int], pattern: str = "o i -> i o") -> Transform:
    """Cut the reference's rows into pieces of `sizes`, then rearrange each by `pattern`."""
    piece = axes(pattern)
    rows_first = pattern.split("->")[0].replace("o", "*", 1).strip()

    def to_ours(array):
        pieces = einops.unpack(array, [(size,) for size in sizes], rows_first)
        return tuple(piece.to_ours(rows)[0] for rows in pieces)

    def to_reference(*leaves):
        return einops.pack([piece.to_reference(leaf) for leaf in leaves], rows_first)[0]

    return Transform(to_ours, to_reference)


IDENTITY = Transform(lambda array: (array,), lambda array: array)
LINEAR = axes("o i -> i o")  # torch Linear -> nnx.Linear kernel
CONV = axes("o i h w -> h w i o")  # torch Conv2d -> nnx.Conv kernel
POINTWISE = axes("o i 1 1 -> i o")  # torch 1x1 Conv2d -> nnx.Linear kernel


def patch_conv(patch_size: int) -> Transform:
    """Patch convolution (D, C, P, P) -> kernel [C * P * P, D] over (c, p1, p2) patches."""
    return axes("d c p1 p2 -> (c p1 p2) d", p1=patch_size, p2=patch_size)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One reference tensor and the leaves that hold it.

    Attributes:
        reference: name in the reference state dict; may contain `{i}`, the layer of a stack.
        ours: names "a/b/c" of our leaves, in the order in which `transform` returns them.
        transform: map for one layer.
    """

    reference: str
    ours: tuple[str, ...]
    transform: Transform = IDENTITY

    @property
    def stacked(self) -> bool:
        return LAYER in self.reference

    def names(self, depth: int) -> list[str]:
        """Reference names: one for each of `depth` layers, or the single one."""
        if not self.stacked:
            return [self.reference]
        return [self.reference.replace(LAYER, str(i)) for i in range(depth)]


def tensor(reference: str, ours: str, transform: Transform = IDENTITY) -> tuple[Rule, ...]:
    """One tensor to one leaf."""
    return (Rule(reference, (ours,), transform),)


def linear(
    reference: str, ours: str, bias: bool = True, *, kernel: Transform = LINEAR
) -> tuple[Rule, ...]:
    """`reference.weight` (and `.bias`) -> `ours/kernel` (and `ours/bias`)."""
    rules = tensor(f"{reference}.weight", f"{ours}/kernel", kernel)
    return rules + tensor(f"{reference}.bias", f"{ours}/bias") if bias else rules


def conv(reference: str, ours: str, bias: bool = True) -> tuple[Rule, ...]:
    """`reference.weight` (O, I, H, W) -> `ours/kernel` [H, W, I, O], and the bias."""
    return linear(reference, ours, bias, kernel=CONV)


def norm(reference: str, ours: str, bias: bool = True) -> tuple[Rule, ...]:
    """`reference.weight` (and `.bias`) -> `ours/scale` (and `ours/bias`)."""
    rules = tensor(f"{reference}.weight", f"{ours}/scale")
    return rules + tensor(f"{reference}.bias", f"{ours}/bias") if bias else rules


def embedding(reference: str, ours: str) -> tuple[Rule, ...]:
    """`reference.weight` (rows, D) -> `ours/embedding`, unchanged."""
    return tensor(f"{reference}.weight", f"{ours}/embedding")


def under(reference: str, ours: str, rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Put a table under a prefix: `under("enc.{i}.attn", "enc/blocks/attn", attention)`."""
    return tuple(
        Rule(f"{reference}.{r.reference}", tuple(f"{ours}/{o}" for o in r.ours), r.transform)
        for r in rules
    )


def to_params(
    rules: Sequence[Rule],
    state_dict: Mapping[str, Any],
    like: Params,
    *,
    ignored: Sequence[str] = (),
) -> Params:
    """Convert a reference state dict.

    Args:
        rules: the table.
        state_dict: arrays (anything `np.asarray` takes) under the reference's names.
        like: our parameters, arrays or `jax.ShapeDtypeStruct`s: names, shapes, depths and dtypes.
        ignored: glob patterns of reference names that may be present and are not used.

    Returns:
        NumPy arrays in the structure, shapes and dtypes of `like`.

    Raises:
        ValueError: a tensor is missing, left over or has another shape (the first few are named),
            or the table does not cover `like`.
    """
    leaves = tree.flatten(like)
    expected = reference_shapes(rules, like)
    _check_names(expected, state_dict, ignored)
    _check_shapes(expected, state_dict)
    flat = {}
    for rule in rules:
        names = rule.names(_depth(rule, leaves))
        layers = [rule.transform.to_ours(np.asarray(state_dict[name])) for name in names]
        for ours, arrays in zip(rule.ours, zip(*layers, strict=True), strict=True):
            array = np.stack(arrays) if rule.stacked else arrays[0]
            flat[ours] = np.ascontiguousarray(array, dtype=leaves[ours].dtype)
    # In the structure of `like`: its list indices are integers, in names they are text.
    structure = jax.tree.structure(like)
    return jax.tree.unflatten(structure, [flat[name] for name in _names_in_order(like)])


def to_state_dict(rules: Sequence[Rule], params: Params) -> dict[str, Any]:
    """Convert our parameters (or gradients) to a state dict under the reference's names.

    The arrays keep their kind (NumPy, JAX, tracer). Constants and buffers that have no leaf on
    our side are not restored.

    Raises:
        ValueError: the table does not cover `params`.
    """
    leaves = tree.flatten(params)
    _check_cover(rules, leaves)
    state_dict = {}
    for rule in rules:
        arrays = [leaves[ours] for ours in rule.ours]
        for i, name in enumerate(rule.names(_depth(rule, leaves))):
            layer = [array[i] for array in arrays] if rule.stacked else arrays
            state_dict[name] = rule.transform.to_reference(*layer)
    return state_dict


def reference_shapes(rules: Sequence[Rule], like: Params) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the reference state dict that fills `like`."""
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), like)
    shapes = jax.eval_shape(lambda params: to_state_dict(rules, params), abstract)
    return {name: leaf.shape for name, leaf in shapes.items()}


def _names_in_order(like: Params) -> list[str]:
    """Names of the leaves in the order of `jax.tree.leaves`."""
    paths = jax.tree.leaves_with_path(like)
    return [tree.SEPARATOR.join(str(entry.key) for entry in path) for path, _ in paths]


def _depth(rule: Rule, leaves: Mapping[str, Any]) -> int:
    return leaves[rule.ours[0]].shape[0] if rule.stacked else 1


def _check_cover(rules: Sequence[Rule], leaves: Mapping[str, Any]) -> None:
    """The table and our leaves must agree: a mistake of the table, not of the checkpoint."""
    covered = [ours for rule in rules for ours in rule.ours]
    problems = {
        "leaf without a rule": sorted(set(leaves) - set(covered)),
        "rule without a leaf": sorted(set(covered) - set(leaves)),
        "leaf with two rules": sorted({name for name in covered if covered.count(name) > 1}),
    }
    _raise_on(problems, "conversion table does not match the model (check the model config)")


def _check_names(
    expected: Mapping[str, Any], state_dict: Mapping[str, Any], ignored: Sequence[str]
) -> None:
    surplus = set(state_dict) - set(expected)
    problems = {
        "missing": sorted(set(expected) - set(state_dict)),
        "surplus": sorted(n for n in surplus if not any(fnmatch.fnmatch(n, p) for p in ignored)),
    }
    _raise_on(problems, "state dict does not match the model (check the model config)")


def _check_shapes(expected: Mapping[str, tuple[int, ...]], state_dict: Mapping[str, Any]) -> None:
    misshapen = [
        f"{name} has {tuple(state_dict[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if tuple(state_dict[name].shape) != shape
    ]
    _raise_on({"misshapen": misshapen}, "state dict does not match the model (check its config)")


def _raise_on(problems: Mapping[str, list[str]], message: str) -> None:
    texts = []
    for kind, names in problems.items():
        if names:
            more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
            texts.append(f"{kind} {', '.join(names[:MAX_LISTED])}{more}")
    if texts:
        raise ValueError(f"{message}: {'; '.join(texts)}")
