"""Solvers on a given time grid: linear multistep methods for dx/dt = velocity(x, t), and
Euler-Maruyama for the stochastic equation with the same marginals.

One step from t_i to t_i + h is

    u_i = a_i * velocity_i + b_i * velocity_{i-1}
    x  <- x + h * (gain_i * u_i + pull_i * x) + spread_i * noise_i

    euler:             (a, b) = (1, 0)                                         gain 1, pull 0
    adams_bashforth2:  (a, b) = (3/2, -1/2), except (1, 0) in the first step   gain 1, pull 0
    euler_maruyama:    (a, b) = (1, 0);   gain = drift_scale * (1 + t_i),   pull = -drift_scale,
                       spread = noise_scale * sqrt(2 * (1 - t_i) * h); the last step is without
                       noise and without drift_scale

The Adams-Bashforth coefficients are those of a uniform grid even though shifted grids are not
uniform: the published numbers were made so (reference: `adams2`).

The stochastic equation adds diffusion w(t) = 2 (1 - t) to the path of `flow.path` (Ma et al. 2024,
arXiv:2401.08740): drift = velocity + w / 2 * score = (1 + t) * velocity - x. The scales are
TransDiff's `scale_0` and `scale_1`; its reference counts time backwards, from 1 (noise) to 0.

A *preview* after step i is x + (1 - t_i) * u_i, one long step to the data; after the last step of a
multistep method it is the result.

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
"""Multistep methods."""
EULER_MARUYAMA = "euler_maruyama"

Constraint = Callable[[Array, Array], Array]
"""Maps (x [B, ...], t [B]) to a state like x."""
StepNoise = Callable[[Array], Array]
"""Maps the index of a step to its noise, standard normal, like x."""


class Coefficients(NamedTuple):
    """Coefficients of one step, float32 scalars, or of all, arrays [steps]; see above."""

    current: Array | np.ndarray
    previous: Array | np.ndarray
    gain: Array | np.ndarray
    pull: Array | np.ndarray
    spread: Array | np.ndarray

    def select(self, steps: int | slice) -> "Coefficients":
        """Return those of some steps."""
        return Coefficients(*(values[steps] for values in self))


class SolverState(NamedTuple):
    """State of an integration: `x` and the last `velocity`, float32 of equal shape."""

    x: Array
    velocity: Array


class Solution(NamedTuple):
    """`x` at the last time; `previews` [steps, ...]: the jump to t = 1 after every evaluation."""

    x: Array
    previews: Array


def coefficients(solver: str, num_steps: int) -> Coefficients:
    """Return the coefficients of every step of a multistep method.

    Raises:
        ValueError: an unknown solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} must be one of {', '.join(SOLVERS)}")
    ones, zeros = np.ones(num_steps, np.float32), np.zeros(num_steps, np.float32)
    current, previous = ones.copy(), zeros.copy()
    if solver == "adams_bashforth2":
        current[1:], previous[1:] = 1.5, -0.5
    return Coefficients(current, previous, gain=ones, pull=zeros, spread=zeros)


def euler_maruyama(
    times: Float[np.ndarray, " times"], *, drift_scale: float = 1.0, noise_scale: float = 1.0
) -> Coefficients:
    """Return the coefficients of every step of the stochastic method on the grid `times`."""
    t, h = times[:-1], np.diff(times)
    drift = np.full_like(t, drift_scale)
    drift[-1] = 1.0
    spread = noise_scale * np.sqrt(2 * (1 - t) * h)
    spread[-1] = 0.0
    ones, zeros = np.ones_like(t), np.zeros_like(t)
    steps = Coefficients(ones, zeros, gain=drift * (1 + t), pull=-drift, spread=spread)
    return jax.tree.map(np.float32, steps)


@jax.jit
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
    coefficients: Coefficients,
    constraint: Constraint | None = None,
    noise: Float[Array, "B ..."] | None = None,
) -> tuple[SolverState, Array]:
    """Advance from `time` to `next_time`; return the new state and the preview.

    Args:
        velocity_fn: maps (x [B, ...], t [B], condition) to a velocity like x.
        state: where the integration stands.
        time: current time.
        next_time: time after the step.
        condition: passed on to `velocity_fn`.
        coefficients: of this step.
        constraint: what the new state fulfils.
        noise: of a stochastic step.
    """
    x, c = state.x, coefficients
    t = jnp.full(x.shape[:1], time, jnp.float32)
    velocity = velocity_fn(x, t, condition).astype(jnp.float32)
    direction = c.current * velocity + c.previous * state.velocity
    preview = x + (1 - time) * direction
    x = x + (next_time - time) * (c.gain * direction + c.pull * x)
    if noise is not None:
        x = x + c.spread * noise
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

    def body(state: SolverState, inputs: Any) -> tuple[SolverState, Array]:
        return step(velocity_fn, state, *inputs, constraint=constraint)

    state, previews = jax.lax.scan(body, start(x), _inputs(times, conditions, table))
    return Solution(state.x, previews)


def advance(
    velocity_fn: Callable[[Array, Array, Any], Array],
    state: SolverState,
    times: Float[Array, " times"] | Float[np.ndarray, " times"],
    conditions: Any,
    coefficients: Coefficients,
    *,
    step_noise: StepNoise | None = None,
) -> tuple[SolverState, Float[Array, "B ..."]]:
    """Take the steps of a part of a grid; return the state and the preview after the last one.

    Args:
        velocity_fn: as of `integrate`.
        state: at times[0].
        times: the part of the grid.
        conditions: as of `integrate`; None is none.
        coefficients: of these steps.
        step_noise: of stochastic steps; it gets the index of a step within the part.
    """

    def body(carry: tuple[SolverState, Array], inputs: Any) -> tuple[Any, None]:
        *inputs, index = inputs
        noise = None if step_noise is None else step_noise(index)
        return step(velocity_fn, carry[0], *inputs, noise=noise), None

    inputs = (*_inputs(times, conditions, coefficients), jnp.arange(len(times) - 1))
    return jax.lax.scan(body, (state, state.x), inputs)[0]


def _inputs(times: Any, conditions: Any, coefficients: Coefficients) -> tuple[Any, ...]:
    """What the steps of a scan see."""
    times = jnp.asarray(times, jnp.float32)
    return times[:-1], times[1:], conditions, jax.tree.map(jnp.asarray, coefficients)
