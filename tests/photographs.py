"""Crops of the colour photographs that scikit-image and scikit-learn ship, as an image folder.

    python -m tests.photographs DIR

writes `DIR/train/NAME/*.png` and `DIR/val/NAME/*.png`, 64 pixels a side, a class per photograph.
What is held out is the right quarter of each, so that no pixel is in both parts.
"""

import pathlib
import sys

import numpy as np
from PIL import Image

SIZE = 64
TRAIN_STRIDE = 32
HELD_OUT = 0.25
SKIMAGE = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "immunohistochemistry")


def photographs() -> dict[str, np.ndarray]:
    """Name -> uint8 [H, W, 3]."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    found = {name: getattr(data, name)() for name in SKIMAGE}
    found["motorcycle"] = data.stereo_motorcycle()[0]
    sample = load_sample_images()
    names = (pathlib.Path(name).stem for name in sample.filenames)
    return {**found, **dict(zip(names, sample.images, strict=True))}


def write_crops(directory: pathlib.Path) -> dict[str, int]:
    """Write all crops and return how many each part has."""
    counts = {"train": 0, "val": 0}
    for name, pixels in photographs().items():
        border = int(pixels.shape[1] * (1 - HELD_OUT))
        parts = {"train": (pixels[:, :border], TRAIN_STRIDE), "val": (pixels[:, border:], SIZE)}
        for part, (region, stride) in parts.items():
            folder = directory / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for top in range(0, region.shape[0] - SIZE + 1, stride):
                for left in range(0, region.shape[1] - SIZE + 1, stride):
                    crop = region[top : top + SIZE, left : left + SIZE]
                    Image.fromarray(crop).save(folder / f"{top:04d}_{left:04d}.png")
                    counts[part] += 1
    return counts


if __name__ == "__main__":
    counts = write_crops(pathlib.Path(sys.argv[1]))
    sys.stdout.write(f"{counts['train']} crops to train on, {counts['val']} held out\n")
