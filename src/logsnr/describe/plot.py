"""Plot: w, p and the emphasis of an objective, as a picture."""

from __future__ import annotations

import io
from pathlib import Path

from logsnr.describe.report import ObjectiveReport
from logsnr.errors import LogsnrError, require
from logsnr.files import replace_file


def plot(report: ObjectiveReport, path: Path) -> None:
    """Write the curves of a report to a .png file.

    Raises:
        LogsnrError: if the suffix is not .png, or matplotlib is not installed.
    """
    if path.suffix != ".png":
        raise LogsnrError(f"--plot {path}: the suffix must be .png")
    figures = require("matplotlib.figure", extra="train", purpose="--plot")
    figure = figures.Figure(figsize=(6.4, 4.8), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    x = report.logsnr.tolist()
    upper.semilogy(x, report.w.clamp(min=1e-12).tolist(), color="#1f5fa8")
    upper.set(ylabel="w, 1 at log-SNR 0", title=report.name[:80])
    top = float(report.w.max())
    upper.set_ylim(max(top * 1e-8, 1e-12), top * 3)
    lower.plot(x, report.emphasis.tolist(), color="#1f5fa8", label="emphasis: share of the loss")
    lower.plot(x, report.p.tolist(), "--", color="#c8553d", label="p: drawn")
    lower.set(xlabel="log-SNR  (noisy ← → clean)", ylabel="per unit of log-SNR")
    lower.set_ylim(bottom=0)
    lower.legend(frameon=False)
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, buffer.getvalue())
