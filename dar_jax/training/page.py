"""`WORKDIR/report.html`: what a run came to, in one file that needs no other."""

import base64
import html

from dar_jax.common import storage
from dar_jax.common.files import replacing
from dar_jax.training import metrics

FILE_NAME = "report.html"
WIDTH, HEIGHT, MARGIN = 480, 160, 4
"""Of a curve, in pixels."""
LOSSES = ("loss", "flow_loss", "token_accuracy", "codebook_usage")
"""Metrics of training that are drawn; of held-out pictures all are."""
STYLE = """
body { font-family: sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; }
img { max-width: 100%; image-rendering: pixelated; }
figure { display: inline-block; margin: 0 1em 1em 0; }
polyline { fill: none; stroke: #2563eb; stroke-width: 1.5; }
svg { background: #f3f4f6; }
td { padding-right: 2em; }
pre { background: #f3f4f6; padding: 1em; overflow-x: auto; }
"""

GOING_ON = """The same command again, and behind it
  --config.train.steps={more}    trains on
  --mode=sample                 draws: {workdir}/samples
  --mode=evaluate               measures: {workdir}/evaluation.json
In Python
  dar_jax.from_pretrained("{workdir}/model")"""


def write(workdir: storage.Path, title: str, step: int) -> None:
    """Write the report: figures, the latest pictures, curves, and how to go on.

    Args:
        workdir: of the run, with its metrics file and `images/`.
        title: what was trained.
        step: the last one.
    """
    path = workdir / metrics.FILE_NAME
    figures = metrics.last_evaluation(path, step)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{value}</td></tr>" for name, value in figures.items()
    )
    pictures = "".join(map(_figure, latest_pictures(workdir / "images")))
    names = [f"train/{name}" for name in LOSSES]
    names += [name.replace("held-out ", "eval/") for name in figures]
    curves = "".join(_curve(name, metrics.history(path, name, step)) for name in names)
    next_steps = GOING_ON.format(workdir=workdir, more=2 * step)
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>
<h1>{html.escape(title)}</h1>
<p>{step:,} steps.</p>
<table>{rows}</table>
{pictures}
<h2>Curves</h2>
{curves}
<h2>How to go on</h2>
<pre>{html.escape(next_steps)}</pre>
</html>
"""
    with replacing(workdir / FILE_NAME) as temporary:
        temporary.write_text(page)


def latest_pictures(directory: storage.Path) -> list[storage.Path]:
    """Return the newest file of each name of `NAME_STEP.png`."""
    newest = {path.stem.rpartition("_")[0]: path for path in sorted(directory.glob("*_*.png"))}
    return list(newest.values())


def _figure(path: storage.Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    name = html.escape(path.stem)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{name}"></figure>'


def _curve(name: str, points: list[tuple[int, float]]) -> str:
    """Draw a curve, with its range; one of less than two points is left out."""
    if len(points) < 2:
        return ""
    steps, values = zip(*points, strict=True)
    low, high = min(values), max(values)
    inner, span = (WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN), max(steps) - min(steps) or 1
    line = " ".join(
        f"{MARGIN + inner[0] * (step - min(steps)) / span:.1f},"
        f"{MARGIN + inner[1] * (high - value) / ((high - low) or 1.0):.1f}"
        for step, value in points
    )
    caption = f"{html.escape(name)}: {low:.4g} to {high:.4g}, at the end {values[-1]:.4g}"
    return (
        f'<figure><svg width="{WIDTH}" height="{HEIGHT}"><polyline points="{line}"/></svg>'
        f"<figcaption>{caption}</figcaption></figure>"
    )
