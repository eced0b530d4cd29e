"""Inception score (Salimans et al. 2016, arXiv:1606.03498, section 4).

    exp(mean_x KL(p(y | x) || p(y))),      p(y) = mean_x p(y | x)

Both the ADM evaluation suite and torch-fidelity take logits without the bias of the last layer.
The suite splits the images in the order in which they are; torch-fidelity shuffles them first,
with `numpy.random.RandomState(2020).permutation`. The order matters if it is by class.
"""

import numpy as np
from scipy.special import log_softmax

from dar_jax.common.typing import Float

SPLITS = 10


def inception_score(
    logits: Float[np.ndarray, "N classes"], splits: int = SPLITS
) -> tuple[float, float]:
    """Mean and standard deviation of the score over consecutive parts of the images.

    Raises:
        ValueError: there are fewer images than splits.
    """
    if not 1 <= splits <= len(logits):
        raise ValueError(f"{splits} splits of {len(logits)} images: use 1 to {len(logits)} splits")
    edges = [i * len(logits) // splits for i in range(splits + 1)]
    scores = [_score(logits[first:stop]) for first, stop in zip(edges[:-1], edges[1:], strict=True)]
    return float(np.mean(scores)), float(np.std(scores))


def _score(logits: Float[np.ndarray, "N classes"]) -> float:
    log_p = log_softmax(logits.astype(np.float64), axis=1)
    p = np.exp(log_p)
    divergence = np.sum(p * (log_p - np.log(p.mean(axis=0))), axis=1)
    return float(np.exp(divergence.mean()))
