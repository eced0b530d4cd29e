"""Loader of the golden folders: weights by recipe, arrays, tolerances, and a strict comparison.

Every weight is defined by one formula (`weights.json` lists seed, name, shape, offset, scale):

    seed32 = crc32(utf8(f"{seed}:{name}"))          or, where `weights.json` has that `seeding`,
             (crc32(utf8(name)) + seed) % 2**32
    z      = numpy.random.RandomState(seed32).standard_normal(shape)    # float64, C order
    value  = float32(offset + scale * z)

Inputs that the reference drew from one such stream are drawn again: `draws` in `arrays.json` lists
what it was asked for, in order. numpy guarantees the stream of this legacy generator, so values are
the same bit for bit.
"""

import json
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

ROOT = pathlib.Path(__file__).parent
COMPARED_ROLES = ("output", "exact")
SEEDINGS = {
    "crc32(seed:name)": lambda seed, name: zlib.crc32(f"{seed}:{name}".encode()),
    "crc32(name) + seed": lambda seed, name: (zlib.crc32(name.encode()) + seed) % 2**32,
}
"""How a tensor's own seed follows from that of its folder."""


def make(
    seed: int,
    name: str,
    shape: Sequence[int],
    offset: float = 0.0,
    scale: float = 1.0,
    *,
    seeding: str = "crc32(seed:name)",
) -> np.ndarray:
    """One tensor of the recipe; large inputs are made under a name starting with `input/`."""
    z = np.random.RandomState(SEEDINGS[seeding](seed, name)).standard_normal(tuple(shape))
    return (offset + scale * z).astype(np.float32)


def load_json(folder: str, name: str) -> Any:
    """`load_json("dar/gpt_tiny", "config")`."""
    return json.loads((ROOT / folder / f"{name}.json").read_text())


def load_state_dict(folder: str) -> dict[str, np.ndarray]:
    """All tensors of a folder under the reference's names, float32, the reference's layouts."""
    recipe = load_json(folder, "weights")
    seeding = {"seeding": recipe["seeding"]} if "seeding" in recipe else {}
    state_dict = {}
    for tensor in recipe["tensors"]:
        name, shape = tensor["name"], tensor["shape"]
        if "value" in tensor:
            state_dict[name] = np.asarray(tensor["value"], np.float32).reshape(shape)
        else:
            size = tensor["offset"], tensor["scale"]
            state_dict[name] = make(recipe["seed"], name, shape, *size, **seeding)
    return state_dict


def load_io(folder: str, name: str = "io") -> tuple[dict[str, np.ndarray], dict[str, dict]]:
    """Arrays of `{name}.npz` and of `draws`, and the specification (role, atol) of each."""
    spec = load_json(folder, "arrays")
    with np.load(ROOT / folder / f"{name}.npz") as file:
        arrays = dict(file)
    if "draws" in spec:
        arrays |= draw_again(**spec["draws"])
    return arrays, spec[name]


def draw_again(
    seed: int, sequence: Sequence[tuple[str | None, str, Sequence]]
) -> dict[str, np.ndarray]:
    """Ask a generator for `(name, method, arguments)` in turn; keep what has a name, float32."""
    generator, kept = np.random.RandomState(seed), {}
    for name, method, arguments in sequence:
        drawn = getattr(generator, method)(*arguments)
        if name is not None:
            kept[name] = drawn.astype(np.float32)
    return kept


class Compare:
    """Compares values with one `io*.npz` and insists that no expected array was left out.

    Attributes:
      arrays: the stored arrays, inputs included, in the reference's layouts.
    """

    def __init__(self, folder: str, name: str = "io"):
        self.where = f"{folder}/{name}"
        self.arrays, self.spec = load_io(folder, name)
        assert set(self.arrays) == set(self.spec), f"{self.where}: arrays.json is out of step"
        self.compared: set[str] = set()

    def check(self, name: str, value: Any) -> None:
        """Assert that `value` has the stored shape and equals the array as its role demands."""
        role, expected, value = self.spec[name]["role"], self.arrays[name], np.asarray(value)
        assert role in COMPARED_ROLES, f"{self.where}:{name} is an {role}"
        assert value.shape == expected.shape, (
            f"{self.where}:{name} has shape {value.shape}, expected {expected.shape}"
        )
        if role == "exact":
            wrong = np.sum(value != expected)
            assert wrong == 0, f"{self.where}:{name} differs in {wrong} of {expected.size} places"
        else:
            atol = self.spec[name]["atol"]
            gap = np.abs(value.astype(np.float64) - expected.astype(np.float64))
            assert np.all(gap <= atol), f"{self.where}:{name} is off by {np.max(gap):.3g} > {atol}"
        self.compared.add(name)

    def check_all(self, **values: Any) -> None:
        """`check` each keyword."""
        for name, value in values.items():
            self.check(name, value)

    def finish(self) -> None:
        """Assert that every array of role output or exact was compared."""
        expected = {name for name, spec in self.spec.items() if spec["role"] in COMPARED_ROLES}
        left_out = sorted(expected - self.compared)
        assert not left_out, f"{self.where}: not compared: {', '.join(left_out)}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        if error_type is None:
            self.finish()
