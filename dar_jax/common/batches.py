"""Batches of one size."""

import numpy as np


def pad(values: np.ndarray, size: int) -> np.ndarray:
    """Repeat the last row up to `size` rows: another batch size would compile everything again."""
    return np.pad(values, [(0, size - len(values))] + [(0, 0)] * (values.ndim - 1), "edge")
