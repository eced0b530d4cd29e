"""How images enter CLIP."""

import numpy as np
import pytest

from dar_jax.evaluation.clip_score import resize
from dar_jax.evaluation.config import EvaluateConfig


def test_the_middle_of_an_image_enters():
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30] = 200
    np.testing.assert_array_equal(resize(pixels, 20), np.full((20, 20, 3), 200, np.uint8))
    assert resize(pixels, 8).shape == resize(pixels.swapaxes(0, 1), 8).shape == (8, 8, 3)
    np.testing.assert_array_equal(resize(pixels[:, :20], 20), pixels[:, :20])


@pytest.mark.parametrize("judge", [{"clip": "x"}, {"attributes": "a=b|c"}])
@pytest.mark.parametrize("others", [{"images": "a.npz"}, {"evaluators": "reconstruction"}])
def test_only_what_is_drawn_is_judged(judge, others):
    with pytest.raises(ValueError, match="='.*' judges what a model draws for prompts"):
        EvaluateConfig(**judge, **others)
    assert EvaluateConfig(**judge, features="")
