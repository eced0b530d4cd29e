"""An independent judge of class-conditional samples: a classifier fitted to the real images."""

import numpy as np

from dar_jax.common.typing import Float, Int, UInt8

REGULARISATION = 10.0
"""`C` of the support vector machine; 95 % and more on held-out digits."""


class Classifier:
    """Support vector machine with a Gaussian kernel on the grey values of small images, or on
    their colours where the real ones have any.
    """

    def __init__(self, pixels: UInt8[np.ndarray, "N H W 3"], labels: Int[np.ndarray, " N"]):
        """Fit to labelled images.

        Raises:
            ValueError: scikit-learn is not installed, or there is only one class.
        """
        if len(np.unique(labels)) == 1:
            raise ValueError(
                "a classifier needs pictures of two classes, these are of one; use "
                "--config.evaluate.classifier=false --config.evaluate.features=vgg16"
            )
        try:
            from sklearn.svm import SVC
        except ImportError as error:
            raise ValueError(
                "this evaluation needs scikit-learn; run pip install 'dar-jax[quickstart]'"
            ) from error
        self._in_colour = bool(np.any(pixels != pixels[..., :1]))
        self._svm = SVC(C=REGULARISATION).fit(self._features(pixels), labels)

    def predict(self, pixels: UInt8[np.ndarray, "N H W 3"]) -> Int[np.ndarray, " N"]:
        """Name the class of every image."""
        return self._svm.predict(self._features(pixels))

    def accuracy(
        self, pixels: UInt8[np.ndarray, "N H W 3"], labels: Int[np.ndarray, " N"]
    ) -> float:
        """Share of images whose class is named right."""
        return float(np.mean(self.predict(pixels) == labels))

    def _features(self, pixels: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N D"]:
        values = pixels if self._in_colour else pixels.mean(axis=-1)
        return values.reshape(len(pixels), -1) / 255.0


def balanced_accuracy(named: Int[np.ndarray, " N"], labels: Int[np.ndarray, " N"]) -> float:
    """Mean over the classes of how often each is named right.

    What accuracy on samples compares with, whose classes are drawn in turns, where the real images
    are more of some classes than of others.
    """
    from sklearn.metrics import recall_score

    return float(recall_score(labels, named, labels=np.unique(labels), average="macro"))
