"""Style: how every figure of ours looks; matplotlib is imported when one is drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any, Literal

from logsnr.errors import require

COLOURS = ("#1f5fa8", "#c8553d", "#3c8d5a", "#7a5ea8", "#8a8a8a")
FAINT = "#999999"
LOGSNR = "log-SNR  (noisy ← → clean)"
STYLE = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "text.parse_math": False,  # names of files and classes are no formulas
    "svg.hashsalt": "logsnr",
    "svg.fonttype": "none",
}


def drawn(
    draw: Callable[[Any], None],
    *,
    width: float = 6.0,
    height: float = 3.6,
    purpose: str = "the figure",
    layout: str = "constrained",
) -> Any:
    """A matplotlib figure of so many inches, after `draw(figure)`; a notebook shows it.

    Raises:
        LogsnrError: if matplotlib is not installed.
    """
    matplotlib = require("matplotlib", extra="train", purpose=purpose)
    figures = require("matplotlib.figure", extra="train", purpose=purpose)
    with matplotlib.rc_context(STYLE):
        figure = figures.Figure(figsize=(width, height), layout=layout)
        draw(figure)
    figure._repr_png_ = lambda: encoded(figure, "png")
    return figure


def encoded(figure: Any, form: Literal["svg", "png"], *, dpi: int = 130) -> bytes:
    """The file of a figure; the same figure gives the same bytes."""
    matplotlib = require("matplotlib", extra="train", purpose="the figure")
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=form, dpi=dpi, metadata={"Date": None} if form == "svg" else {"Software": None})
    return buffer.getvalue()


def plain_ticks(axes: Any) -> None:
    """Plain numbers at 1-2-3-5 steps on a logarithmic vertical axis, however short it is; fewer on a long one."""
    from matplotlib import ticker

    class Steps(ticker.LogLocator):
        def tick_values(self, vmin: float, vmax: float) -> Any:
            decades = math.log10(vmax / vmin) if 0 < vmin < vmax else 0.0
            self.set_params(subs=(1, 2, 3, 5) if decades < 3 else (1, 3) if decades < 4 else (1,))
            return super().tick_values(vmin, vmax)

    axes.yaxis.set_major_locator(Steps(base=10))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
