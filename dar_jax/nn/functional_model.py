"""A module as pure functions of plain nested parameter dicts."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import jax
from flax import nnx

from dar_jax.common.typing import Any, Params, PRNGKeyArray
from dar_jax.nn.compute import Compute

M = TypeVar("M", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class FunctionalModel(Generic[M]):
    """Parameters live outside, in plain dicts; `bind` gives them their module back.

    Hashable and compared by value, so it can be a static argument of a jitted function.

    Attributes:
        cls: module class with the constructor `cls(config, *, rngs, compute)`.
        config: its architecture, a frozen dataclass.
        compute: its execution choices.
    """

    cls: Callable[..., M]
    config: Any
    compute: Compute = Compute()

    def init(self, rng: PRNGKeyArray) -> Params:
        """Draw the parameters: a plain nested dict of float32 arrays."""
        module = self.cls(self.config, rngs=nnx.Rngs(rng), compute=self.compute)
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    def bind(self, params: Params) -> M:
        """Return the module with these parameters."""
        return nnx.merge(_graphdef(self), params)

    @contextlib.contextmanager
    def in_float32(self, params: Params) -> Iterator[M]:
        """Give the module in float32, and products that are float32 on every platform.

        Accelerators would multiply float32 in less, TPUs in bfloat16, which flips close calls
        between codes.
        """
        exact = dataclasses.replace(
            self, compute=dataclasses.replace(self.compute, dtype="float32")
        )
        with jax.default_matmul_precision("highest"):
            yield exact.bind(params)

    @contextlib.contextmanager
    def decoding(self, params: Params) -> Iterator[M]:
        """Give the module in its own dtype; products of float32 lose no more than in TF32.

        That is what published images are decoded in. By default, TPUs would multiply in bfloat16.
        """
        with jax.default_matmul_precision("high"):
            yield self.bind(params)

    def abstract_params(self) -> Params:
        """Shapes and dtypes of the parameters."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def unstacked(self) -> "FunctionalModel[M]":
        """The same model with its layers unrolled; takes `stack.unstack`ed parameters."""
        return dataclasses.replace(self, compute=dataclasses.replace(self.compute, stacked=False))


@functools.lru_cache(maxsize=64)
def _graphdef(model: FunctionalModel) -> nnx.GraphDef:
    def construct() -> nnx.Module:
        return model.cls(model.config, rngs=nnx.Rngs(0), compute=model.compute)

    return nnx.split(nnx.eval_shape(construct))[0]
