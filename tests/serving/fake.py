"""Draws nothing but squares, at once, so that tests see the engine and the API alone."""

import threading

import numpy as np

from dar_jax.models.dar.options import DarSampling
from dar_jax.serving.drawing import Drawn, LaneBatch, Piece
from dar_jax.serving.inputs import Offer

SIDE, NUM_GROUPS = 8, 4
OFFER = Offer(
    model="squares",
    class_names=("cat", "dog", "car"),
    num_classes=5,
    size=SIDE,
    image_size=SIDE,
    num_tokens=16,
    previews=(1, 2, 3),
    sampling=DarSampling(),
    max_images=10,
)


class FakeBatch(LaneBatch):
    """Pixels are the class, and the group in the first row.

    Attributes:
        size: lanes.
        turns: the images, by label and group, of every turn.
        gate: a turn waits until it is set.
        broken: label that no turn survives.
    """

    num_groups = NUM_GROUPS
    num_bytes = 0

    def __init__(self, size=2):
        self.size = size
        self.turns = []
        self.gate = threading.Event()
        self.gate.set()
        self.broken = None
        self.num_resets = 0

    def warm_up(self):
        """Compile nothing."""

    def reset(self):
        self.num_resets += 1

    def draw(self, active):
        self.gate.wait()
        self.turns.append([(i.request.labels[i.index], i.group) for i in active.values()])
        if self.broken in [label for label, _ in self.turns[-1]]:
            raise RuntimeError("out of memory\nand more")
        for image in active.values():
            image.group += 1
        return [Drawn(image, image.group, None, None, 0) for image in active.values()]

    def fetch(self, drawn):
        label = drawn.image.request.labels[drawn.image.index]
        pixels = np.full((SIDE, SIDE, 3), label, np.uint8)
        pixels[0] = drawn.group
        return Piece(drawn.image.index, drawn.group, pixels, drawn.group == self.num_groups)
