"""Codebook metrics over all steps of a logging interval, from the counts of drawn codes."""

import dataclasses

import flax.struct
import jax.numpy as jnp
from clu import metrics

from dar_jax.common.typing import Any, Array, Int


def code_counts(indices: Int[Array, "B N"], codebook_size: int) -> Int[Array, " V"]:
    """How often every code occurs."""
    return jnp.bincount(indices.reshape(-1), length=codebook_size)


@flax.struct.dataclass
class CodeCounts(metrics.Metric):
    """Sum of the `code_counts` output of several steps."""

    counts: Any  # of JAX, or of NumPy on the host

    @classmethod
    def from_model_output(cls, *, code_counts: Array, **_) -> "CodeCounts":
        return cls(counts=code_counts)

    def merge(self, other: "CodeCounts") -> "CodeCounts":
        return dataclasses.replace(self, counts=self.counts + other.counts)


@flax.struct.dataclass
class CodebookUsage(CodeCounts):
    """Share of the codebook that occurred."""

    def compute(self) -> Array:
        return jnp.mean(self.counts > 0)


@flax.struct.dataclass
class CodebookPerplexity(CodeCounts):
    """Exponential of the entropy of the codes; the codebook size if all are equally frequent."""

    def compute(self) -> Array:
        probs = self.counts / jnp.sum(self.counts)
        return jnp.exp(-jnp.sum(jnp.where(probs > 0, probs * jnp.log(probs), 0.0)))
