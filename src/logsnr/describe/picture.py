"""Plot: w, p and the emphasis of an objective, as a picture."""

from __future__ import annotations

from pathlib import Path

from logsnr.describe.report import ObjectiveReport
from logsnr.errors import LogsnrError
from logsnr.plot import curves
from logsnr.report.style import encoded
from logsnr.writing import replace_file


def plot(report: ObjectiveReport, path: Path) -> None:
    """Write the curves of a report to a .png file.

    Raises:
        LogsnrError: if the suffix is not .png, or matplotlib is not installed.
    """
    if path.suffix != ".png":
        raise LogsnrError(f"--plot {path}: the suffix must be .png")
    figure = curves(report.logsnr, report.w, report.p, report.emphasis, title=report.name[:80])
    replace_file(path, encoded(figure, "png"))
