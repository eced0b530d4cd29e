"""Pieces of the demo's page as HTML.

Pictures are data URIs: a preview is seen when its message arrives, and leaves no file behind.
"""

import base64
import html
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from dar_jax.common.typing import UInt8
from dar_jax.data.decode import encode_png

CSS = """
.gradio-container { max-width: 1200px !important; margin: auto !important; }
.tiles { display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fill, minmax(min(110px, 45%), 1fr)); }
.tiles figure, .layout { margin: 0; }
.tiles img, .tiles .empty, .layout img { width: 100%; aspect-ratio: 1; display: block; margin: 0;
  border-radius: 8px; box-sizing: border-box; border: 1px solid var(--border-color-primary); }
.tiles .empty { border-style: dashed; }
.tiles figcaption, .layout figcaption { text-align: center; padding-top: 4px; font-size: 0.85em;
  min-height: 1.5em; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.layout { max-width: 110px; }
.pixelated img { image-rendering: pixelated; }
.status { display: flex; flex-wrap: wrap; gap: 4px 20px; font-variant-numeric: tabular-nums; }
.status .bar { flex: 1 0 100%; height: 6px; border-radius: 3px; overflow: hidden;
  background: var(--border-color-primary); }
.status .bar div { height: 100%; background: var(--color-accent); }
.problem { color: #dc2626; font-weight: 600; }
#gallery .grid-wrap { min-height: 90px; padding-top: 32px; }
#gallery .grid-container { grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)) !important; }
#gallery .thumbnail-item img { object-fit: contain; padding-bottom: 18px; }
#gallery .caption-label { left: 0; right: 0; bottom: 0; max-width: none; padding: 1px 4px;
  border: 0; border-radius: 0; text-align: center; font-size: 0.7em; }
"""


def status(fraction: float, *facts: str) -> str:
    """Return a bar that is filled to a fraction, and facts below it."""
    bar = f'<div class="bar"><div style="width: {fraction:.1%}"></div></div>'
    spans = "".join(f"<span>{html.escape(fact)}</span>" for fact in facts)
    return f'<div class="status" role="status">{bar}{spans}</div>'


def problem(message: str) -> str:
    """Return what went wrong."""
    return f'<div class="problem" role="alert">{html.escape(message)}</div>'


def tiles(names: Sequence[str], pixels: Iterable[UInt8[np.ndarray, "H W 3"]] = ()) -> str:
    """Return a tile per name: its picture, or an empty square where there is none yet."""
    figures = [
        f"<figure>{_EMPTY if picture is None else _img(picture, name)}{_caption(name)}</figure>"
        for name, picture in itertools.zip_longest(names, pixels)
    ]
    return f'<div class="tiles">{"".join(figures)}</div>'


def layout(pixels: UInt8[np.ndarray, "H W 3"]) -> str:
    """Return the picture whose layout is kept."""
    caption = "layout"
    return f'<figure class="layout">{_img(pixels, caption)}{_caption(caption)}</figure>'


_EMPTY = '<div class="empty" style="aspect-ratio: 1"></div>'


def _img(pixels: UInt8[np.ndarray, "H W 3"], name: str) -> str:
    data = base64.b64encode(encode_png(pixels)).decode()
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'


def _caption(name: str) -> str:
    return f"<figcaption>{html.escape(name)}</figcaption>"
