"""Solvers for dx/dt = velocity(x, t): explicit linear multistep methods on a given time grid.

One step from t_i to t_i + h is

    x <- x + h * (a_i * velocity_i + b_i * velocity_{i-1})

    euler:             (a, b) = (1, 0)
    adams_bashforth2:  (a, b) = (3/2, -1/2), except (1, 0) in the first step

The Adams-Bashforth coefficients are those of a uniform grid even though shifted grids are not
uniform: the published numbers were made so (reference: `adams2`). A *preview* after step i is the
same update with h = 1 - t_i, one long step to the data; after the last step it is the result.

A *constraint* replaces the part of x that is known at time t, as in-painting does; it is applied to
the state after every step. Previews are what the velocity says.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.common.typing import Any, Array, Float

SOLVERS = ("euler", "adams_bashforth2")

Constraint = Callable[[Array, Array], Array]
"""Maps (x [B, ...], t [B]) to a state like x."""


class SolverState(NamedTuple):
    """State of an integration: `x` and the last `velocity`, float32 of equal shape."""

    x: Array
    velocity: Array


class Solution(NamedTuple):
    """`x` at the last time; `previews` [steps, ...]: the jump to t = 1 after every evaluation."""

    x: Array
    previews: Array


def coefficients(solver: str, num_steps: int) -> Float[np.ndarray, "steps 2"]:
    """Return (a_i, b_i) of every step.

    Raises:
        ValueError: an unknown solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} must be one of {', '.join(SOLVERS)}")
    table = np.tile(np.float32([1.0, 0.0]), (num_steps, 1))
    if solver == "adams_bashforth2":
        table[1:] = 1.5, -0.5
    return table


def start(x: Float[Array, "B ..."]) -> SolverState:
    """State before the first step."""
    x = x.astype(jnp.float32)
    return SolverState(x, jnp.zeros_like(x))


def step(
    velocity_fn: Callable[[Array, Array, Any], Array],
    state: SolverState,
    time: Float[Array, ""],
    next_time: Float[Array, ""],
    condition: Any,
    coefficients: Float[Array, "2"],
    constraint: Constraint | None = None,
) -> tuple[SolverState, Array]:
    """Advance from `time` to `next_time`; return the new state and the preview.

    Args:
        velocity_fn: maps (x [B, ...], t [B], condition) to a velocity like x.
        state: where the integration stands.
        time: current time.
        next_time: time after the step.
        condition: passed on to `velocity_fn`.
        coefficients: (a, b) of this step.
        constraint: what the new state fulfils.
    """
    x = state.x
    t = jnp.full(x.shape[:1], time, jnp.float32)
    velocity = velocity_fn(x, t, condition).astype(jnp.float32)
    direction = coefficients[0] * velocity + coefficients[1] * state.velocity
    preview = x + (1 - time) * direction
    x = x + (next_time - time) * direction
    if constraint is not None:
        x = constraint(x, jnp.full(x.shape[:1], next_time, jnp.float32))
    return SolverState(x, velocity), preview


def integrate(
    velocity_fn: Callable[[Array, Array, Any], Array],
    x: Float[Array, "B ..."],
    times: Float[Array, " times"] | Float[np.ndarray, " times"],
    conditions: Any,
    *,
    solver: str,
    constraint: Constraint | None = None,
) -> Solution:
    """Integrate over the grid `times`, one velocity evaluation per interval.

    Args:
        velocity_fn: maps (x [B, ...], t [B], condition) to a velocity like x.
        x: state at times[0].
        times: steps + 1 increasing times.
        conditions: a tree of arrays [steps, ...]; step i sees the i-th slices.
        solver: name of a multistep method.
        constraint: what every new state fulfils.
    """
    table = coefficients(solver, len(times) - 1)

    def body(state, inputs):
        return step(velocity_fn, state, *inputs, constraint)

    times = jnp.asarray(times, jnp.float32)
    inputs = (times[:-1], times[1:], conditions, jnp.asarray(table))
    state, previews = jax.lax.scan(body, start(x), inputs)
    return Solution(state.x, previews)
