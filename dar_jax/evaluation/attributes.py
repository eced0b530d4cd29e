"""Whether images show what their prompts say, by judges that are fitted to real pictures.

    tone=light skin tone|dark skin tone; gender=man|woman

names two attributes. A picture has the value whose words its caption has, as whole words, if it has
those of one only; for each attribute a classifier learns it from the training pictures that have
one. Its accuracy on generated images, by their prompts, stands beside that on held-out pictures.
"""

import re
from collections.abc import Sequence

import numpy as np
from absl import logging

from dar_jax.common.typing import UInt8
from dar_jax.data.base import DataConfig
from dar_jax.evaluation.classifier import Classifier
from dar_jax.evaluation.image_sources import SplitImages, read_all

Attributes = dict[str, list[str]]
"""The values of each by its name."""


def read_attributes(text: str) -> Attributes:
    """Read the form of the module.

    Raises:
        ValueError: it is another.
    """
    found: Attributes = {}
    for part in filter(str.strip, text.split(";")):
        name, _, values = part.partition("=")
        found[name.strip()] = [value.strip() for value in values.split("|")]
        if not name.strip() or len(set(found[name.strip()])) < 2 or "" in found[name.strip()]:
            raise ValueError(f"attributes: {part.strip()!r} is not of the form name=one|two")
    return found


def values_of(captions: Sequence[str], values: Sequence[str]) -> np.ndarray:
    """Return the index of each caption's value, -1 where it has none or several."""
    patterns = [re.compile(rf"(?<![\w-]){re.escape(value)}(?![\w-])", re.I) for value in values]
    found = [[bool(pattern.search(text)) for pattern in patterns] for text in captions]
    seen = np.reshape(np.array(found, bool), (len(captions), len(patterns)))
    return np.where(seen.sum(axis=1) == 1, seen.argmax(axis=1), -1)


class AttributeJudges:
    """A classifier for each attribute.

    Attributes:
        on_real: metrics of the held-out pictures.
    """

    def __init__(self, attributes: Attributes, data: DataConfig):
        """Fit them.

        Raises:
            ValueError: scikit-learn is not installed, or captions of training pictures have fewer
                than two values of an attribute.
        """
        train, test = (SplitImages(data, split) for split in ("train", "test"))
        captions, pixels = train.captions(), read_all(train)
        self._attributes, self._judges = attributes, {}
        for name, values in attributes.items():
            labels = values_of(captions, values)
            if len(np.unique(labels[labels >= 0])) < 2:
                raise ValueError(
                    f"attributes: fewer than two of {name}={'|'.join(values)} are in the captions "
                    "of training pictures"
                )
            kept = labels >= 0
            logging.info("Fitting the judge of %s to %d real images", name, kept.sum())
            self._judges[name] = Classifier(pixels[kept], labels[kept])
        found = self.metrics(read_all(test), test.captions())
        self.on_real = {f"{name}_on_real": value for name, value in found.items()}

    def metrics(
        self, pixels: UInt8[np.ndarray, "N H W 3"], captions: Sequence[str]
    ) -> dict[str, float]:
        """Share of right values among the images whose captions have one, by attribute."""
        metrics = {}
        for name, judge in self._judges.items():
            labels = values_of(captions, self._attributes[name])
            kept = labels >= 0
            if kept.any():
                metrics[f"{name}_accuracy"] = judge.accuracy(pixels[kept], labels[kept])
        return metrics
