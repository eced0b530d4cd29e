"""Token codes of a data set (see `encoded`), which a prior trains on.

A record holds the codes [crops, N] of all crops of one picture, 2 bytes each. Which crop is seen is
drawn anew every time, by the task.
"""

import numpy as np

from dar_jax.data import encoded
from dar_jax.data.base import DataConfig, existing_directory
from dar_jax.data.shards import POSITIVE

KEYS = {"num_tokens": POSITIVE}
FORM = encoded.Form("codes", "codes", np.dtype("<u2"), "tokenizer", KEYS)
MAX_CODEBOOK_SIZE = 2 ** (8 * FORM.dtype.itemsize)


def load_codes(config: DataConfig, split: str) -> encoded.CachedSource:
    """Open a split of the cache in `config.path`: `codes` uint16 [crops, N].

    Raises:
        ValueError: it is missing, incomplete or broken.
    """
    directory = existing_directory(config)
    num_tokens = encoded.read_contents(directory, FORM)["num_tokens"]
    return encoded.open_split(directory, split, FORM, (num_tokens,))
