"""How TransDiff draws latents: the options of its solver, documented and checked.

The defaults draw as the model was trained to, with no guidance; recipes set what makes good images.
"""

import dataclasses

import numpy as np

from dar_jax.common.checks import Numbers, check_number, read_numbers
from dar_jax.common.typing import Float
from dar_jax.flow import solvers
from dar_jax.flow.guidance import ALWAYS
from dar_jax.flow.times import check_num_steps, shifted_grid, stochastic_grid
from dar_jax.models.transdiff.model import TransDiffConfig
from dar_jax.sampling.search import Search

SOLVERS = (solvers.EULER_MARUYAMA, *solvers.SOLVERS)


@dataclasses.dataclass(frozen=True)
class TransDiffSampling:
    """How latents are drawn.

    Attributes:
        num_steps: of the solver, in every pass.
        guidance_scale: one scale for all passes, or one for each; 1 is no guidance.
        guidance_times: first and last time that is guided, 0 at the noise; empty guides all.
        solver: "euler_maruyama", "euler" or "adams_bashforth2".
        drift_scale: of the steps of Euler-Maruyama but the last (`scale_0` of the reference).
        noise_scale: of the steps of Euler-Maruyama (`scale_1` of the reference).
        search: draw several candidates and keep the best, e.g.
            `dar_jax.Search("groups", num=2, reward="reward.py")`.
    """

    num_steps: int = 100
    guidance_scale: Numbers = (1.0,)
    guidance_times: Numbers = ()
    solver: str = solvers.EULER_MARUYAMA
    drift_scale: float = 1.0
    noise_scale: float = 1.0
    search: Search = Search()

    def __post_init__(self):
        scales = read_numbers("guidance_scale", self.guidance_scale)
        times = read_numbers("guidance_times", self.guidance_times)
        object.__setattr__(self, "guidance_scale", scales)
        object.__setattr__(self, "guidance_times", times)
        check_num_steps(self.num_steps)
        for name in ("drift_scale", "noise_scale"):
            check_number(name, getattr(self, name))
        if not all(1 <= scale < np.inf for scale in scales):
            raise ValueError(
                f"guidance_scale={scales} must be at least 1 (1 is no guidance) and finite"
            )
        if self.solver not in SOLVERS:
            raise ValueError(f"solver={self.solver!r} must be one of {', '.join(SOLVERS)}")
        for name in ("drift_scale", "noise_scale"):
            if not 0 <= getattr(self, name) <= 2:
                raise ValueError(f"{name}={getattr(self, name)} must be in 0..2 (1 is exact)")
        if times and (len(times) != 2 or not 0 <= times[0] <= times[1] <= 1):
            raise ValueError(f"guidance_times={times} must be (first, last) in 0..1")
        stochastic = self.solver == solvers.EULER_MARUYAMA
        if not stochastic and (self.drift_scale, self.noise_scale) != (1, 1):
            raise ValueError(
                f"solver={self.solver!r} takes no drift_scale={self.drift_scale} and "
                f"noise_scale={self.noise_scale}; leave them at 1"
            )

    def scale_of(self, step_pass: int) -> float:
        """Guidance scale of a pass."""
        scales = read_numbers("guidance_scale", self.guidance_scale)
        return scales[step_pass if len(scales) > 1 else 0]

    @property
    def grid(self) -> Float[np.ndarray, " times"]:
        """Times of the steps, and 1."""
        if self.solver == solvers.EULER_MARUYAMA:
            return stochastic_grid(self.num_steps)
        return shifted_grid(self.num_steps, shift=1.0)

    @property
    def coefficients(self) -> solvers.Coefficients:
        """Coefficients of all steps."""
        if self.solver == solvers.EULER_MARUYAMA:
            return solvers.euler_maruyama(
                self.grid, drift_scale=self.drift_scale, noise_scale=self.noise_scale
            )
        return solvers.coefficients(self.solver, self.num_steps)

    @property
    def guided_times(self) -> tuple[float, float]:
        """First and last time that is guided."""
        times = read_numbers("guidance_times", self.guidance_times)
        return (times[0], times[1]) if times else ALWAYS

    def check(self, config: TransDiffConfig) -> None:
        """Raise ValueError unless these options suit a model of this architecture."""
        given, passes = (
            len(read_numbers("guidance_scale", self.guidance_scale)),
            config.num_references,
        )
        if given not in (1, passes):
            raise ValueError(
                f"guidance_scale={self.guidance_scale} must be one scale"
                + (f" or {passes}, one for each pass" if passes > 1 else "")
            )
        if not self.search.method:
            return
        if not self.search.by_file:
            raise ValueError(
                f"search.reward={self.search.reward!r} judges tokens, and TransDiff has no "
                "likelihood of tokens: name a Python file with reward(images, labels) -> [B]"
            )
        self.search.check_file()
        is_stochastic = self.solver == solvers.EULER_MARUYAMA and self.noise_scale > 0
        if self.search.method != "end" and not (is_stochastic and self.num_steps > 1):
            raise ValueError(
                f"solver={self.solver!r} with noise_scale={self.noise_scale} and num_steps="
                f"{self.num_steps} draws nothing on the way, so that candidates that go on stay "
                "equal: use search.method='end'"
            )
