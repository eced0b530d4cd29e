"""Keys of images: a seed or a key, and one line for anything else."""

import jax
import numpy as np
import pytest

from dar_jax.common.keys import image_keys


def test_a_seed_stands_for_its_key_and_an_image_keeps_its_own() -> None:
    key = jax.random.key(7)
    keys = jax.random.key_data(image_keys(key, 4))
    np.testing.assert_array_equal(jax.random.key_data(image_keys(7, 4)), keys)
    np.testing.assert_array_equal(jax.random.key_data(image_keys(7, 2, 2)), keys[2:])


@pytest.mark.parametrize(
    ("rng", "match"),
    [
        (None, "rng is missing: pass rng=jax.random.key"),
        (-1, "rng=-1 must be in 0"),
        (True, "rng is no key but True"),
        (0.5, "rng is no key but 0.5"),
        (np.zeros(2), "rng is no key but array"),
        (jax.random.split(jax.random.key(0), 1), r"rng holds keys of shape \(1,\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_key_is_refused(rng: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        image_keys(rng, 2)
