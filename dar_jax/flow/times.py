"""Time grids and the resolution-dependent time shift (Esser et al. 2024, section 5.3.2)."""

import numpy as np

from dar_jax.common.typing import Array, Float


def shift_times(t: Array | np.ndarray, shift: float) -> Array | np.ndarray:
    """Map t to t / (t + shift * (1 - t)): shift > 1 spends more time near the noise.

    0 and 1 are fixed points. The same map applies to training draws and to the sampling grid.
    """
    return t / (t + shift * (1 - t))


def shifted_grid(num_steps: int, shift: float) -> Float[np.ndarray, " times"]:
    """Return the num_steps + 1 shifted times from 0 to 1, float32."""
    return shift_times(np.arange(num_steps + 1) / num_steps, shift).astype(np.float32)
