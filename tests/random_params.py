"""Parameters that no initialiser made: nothing is zero, and nothing has to be compiled."""

import jax
import numpy as np

from dar_jax.common.typing import Params

SCALE = 0.5


def random_params(like: Params, seed: int = 0) -> Params:
    """Draw float32 normal arrays on the host in the shapes of `like`.

    A fresh model hides much: gates of zero make codes blind to the image, an output layer of zeros
    makes every loss the same.
    """
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(0, SCALE, leaf.shape).astype(np.float32), like)
