"""What an evaluation says: a table, JSON, and curves.

Figures are numbers by their path, `generation/fid`, or lists of numbers where something is varied:
`generation/fid_of_previews`, `guidance/fid`.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from dar_jax.common import storage
from dar_jax.common.files import replacing
from dar_jax.common.typing import Any

DISTANCES = ("fid", "fd_vgg16")
QUALITIES = ("inception_score", "accuracy")
"""Metrics that curves show, the first of each that there is."""
LABELS = {
    "fid": "FID",
    "fd_vgg16": "Fréchet distance (VGG-16)",
    "inception_score": "Inception score",
    "accuracy": "class accuracy",
}
PANEL_INCHES = (4.0, 3.0)
DPI = 110


def table(values: Mapping[str, Any]) -> str:
    """Lay out a line per name; the numbers of lists stand in columns."""
    width = max(map(len, values))
    texts = {
        name: [format_value(item) for item in value]
        if isinstance(value, list | tuple)
        else [format_value(value)]
        for name, value in values.items()
    }
    column = max((len(text) for row in texts.values() if len(row) > 1 for text in row), default=0)
    return "\n".join(
        f"{name:{width}}  {'  '.join(f'{text:{column}}' for text in row)}".rstrip()
        for name, row in texts.items()
    )


def format_value(value: Any) -> str:
    """Numbers to four digits; a ramp of two scales as `1.1-8`."""
    if isinstance(value, list | tuple):
        return "-".join(map(format_value, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw_curves(
    path: storage.Path,
    ticks: Sequence[str],
    xlabel: str,
    metrics: Mapping[str, Sequence[float]],
) -> None:
    """Draw a panel each for a distance, with its floor, and for a quality.

    Args:
        path: of the picture.
        ticks: names of the places on the horizontal axis.
        xlabel: what is varied.
        metrics: a number for every tick, by metric; others than those of `LABELS` are not drawn.

    Raises:
        ValueError: Matplotlib is not installed.
    """
    groups = [[name for name in names if name in metrics] for names in (DISTANCES, QUALITIES)]
    shown = [names[0] for names in groups if names]
    figure = _figure((PANEL_INCHES[0] * len(shown), PANEL_INCHES[1]))
    for axes, name in zip(np.ravel(figure.subplots(1, len(shown))), shown, strict=True):
        axes.plot(range(len(ticks)), metrics[name], marker="o")
        if f"{name}_floor" in metrics:
            floor = np.mean(metrics[f"{name}_floor"])
            axes.axhline(floor, color="grey", linestyle="--", label="floor: as many real images")
            axes.legend(frameon=False)
        axes.set(xlabel=xlabel, ylabel=LABELS[name])
        axes.set_xticks(range(len(ticks)), ticks)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def draw_calibration(
    path: storage.Path, confidence: Sequence[float], accuracy: Sequence[float]
) -> None:
    """Draw how often a classifier is right where it is so sure; on the diagonal it knows.

    Raises:
        ValueError: Matplotlib is not installed.
    """
    figure = _figure(PANEL_INCHES)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", label="calibrated")
    axes.plot(confidence, accuracy, marker="o", label="as many images a point")
    axes.set(xlabel="posterior of the likeliest class", ylabel=LABELS["accuracy"])
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure: Any, path: storage.Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=DPI)


def _figure(inches: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("curves need Matplotlib; run pip install 'dar-jax[evaluate]'") from error
    return Figure(figsize=inches, layout="constrained")
