"""The picture: RMSE, and FD where there is one, against evaluations per image; the best of the best families stand out.

Every sampler is a grey dot; those far worse than the lines lie above the frame.  A line is the best of a family, of
ours (filled marks) or of diffusers' (hollow, dashed), named at its end; a family has a colour, plans are black.  The
lines are few: plans, and the families with the least errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from logsnr.evaluation.compare.entries import OWN
from logsnr.evaluation.compare.result import Comparison, Row
from logsnr.report.style import drawn, encoded, plain_ticks

COLOURS = {
    "DDIM": "#8a8a8a",
    "GE": "#c8553d",
    "Adams-Bashforth": "#b8860b",
    "PNDM": "#7a5ea8",
    "DEIS": "#3c8d5a",
    "DPM++": "#1f5fa8",
    "DPM-Solver": "#6b8fb5",
    "UniPC": "#2a9d9d",
    "Heun": "#c2569b",
    "universal": "#3b3b3b",
    "Gaussian start": "#5b7f1b",
}


LINES = 6
"""Lines of a panel, unless told."""
_APART = 0.055
"""Share of a panel's height between two names."""

Value = Callable[[Row], float | None]


@dataclass(frozen=True)
class _Line:
    """Points (evaluations, error), and how they look."""

    name: str
    points: tuple[tuple[int, float], ...]
    colour: str
    dashed: bool = False
    marker: str = "o"

    @property
    def error(self) -> float:
        """The geometric mean of its errors."""
        return math.exp(sum(math.log(error) for _, error in self.points) / len(self.points))


def plot(comparison: Comparison, form: Literal["svg", "png"], *, lines: int = LINES) -> bytes:
    """The picture's file, with so many lines to a panel; identical input gives identical bytes.

    Raises:
        LogsnrError: if matplotlib is not installed.
    """
    quantities = [("rmse", "RMSE to the teacher")]
    if comparison.features is not None:
        quantities.append(("frechet", f"FD (features: {comparison.features})"))

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, len(quantities), squeeze=False)[0]
        for one, (by, label) in zip(axes, quantities, strict=True):
            _panel(one, comparison, by, label, lines)
        if comparison.teacher.frechet is not None:
            axes[-1].axhline(comparison.teacher.frechet.value, color="#444444", linewidth=1, linestyle=":")
            axes[-1].annotate(
                "teacher", (0.01, comparison.teacher.frechet.value), xycoords=("axes fraction", "data"),
                ha="left", va="bottom", fontsize=8, color="#444444",
            )  # fmt: skip

    return encoded(drawn(draw, width=5.6 * len(quantities), height=4.4, purpose="the plot"), form)


def _panel(axes: Any, comparison: Comparison, by: str, label: str, most: int) -> None:
    def value(row: Row) -> float | None:
        measured = getattr(row, by)
        return None if measured is None or measured.value <= 0 else float(measured.value)

    dots = [(row.evaluations, v) for row in comparison.rows if (v := value(row)) is not None]
    axes.plot(*zip(*dots, strict=True), ".", color="#c9c9c9", markersize=4, zorder=1) if dots else None
    lines = _lines(comparison, by, value)[:most]
    for line in lines:
        axes.plot(
            *zip(*line.points, strict=True), marker=line.marker, color=line.colour, zorder=3,
            linewidth=1 if line.dashed else 1.6, linestyle="--" if line.dashed else "-",
            markersize=9 if line.marker == "*" else 5, markerfacecolor="white" if line.dashed else line.colour,
        )  # fmt: skip
    ticks = list(comparison.budgets)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set(xlabel="network evaluations per image", ylabel=label)
    if lines:
        errors = [error for line in lines for _, error in line.points]
        low, high = min(errors) / 1.5, max(errors) * 2
        axes.set_ylim(low, high)
        _named(axes, lines, math.log(low), math.log(high))
    plain_ticks(axes)


def _lines(comparison: Comparison, by: str, value: Value) -> list[_Line]:
    """Plans, and then families, the best first."""

    def points(rows: list[Row]) -> tuple[tuple[int, float], ...]:
        return tuple(sorted((row.evaluations, v) for row in rows if (v := value(row)) is not None))

    plans: dict[str, list[Row]] = {}
    for row in comparison.rows:
        if row.origin == "plan":
            plans.setdefault(row.solver, []).append(row)
    leaders = [comparison.best(budget, by) for budget in comparison.budgets]
    families = {key: [best[key] for best in leaders if key in best] for best in leaders for key in best}
    found = [
        _Line(solver if solver == OWN else f"plan {solver}", points(rows), "black", marker="*")
        for solver, rows in plans.items()
    ]
    others = [
        _Line(
            family if origin == "logsnr" else f"{family} in diffusers",
            points(rows),
            COLOURS.get(family, "#555555"),
            dashed=origin == "diffusers",
        )
        for (family, origin), rows in families.items()
        if family != "plan"
    ]
    ranked = (sorted((line for line in group if line.points), key=lambda line: line.error) for group in (found, others))
    return [line for group in ranked for line in group]


def _named(axes: Any, lines: list[_Line], low: float, high: float) -> None:
    """Each line's name beside its end, moved apart where ends lie close together."""
    ends = sorted(lines, key=lambda line: line.points[-1][1])
    at = [(math.log(line.points[-1][1]) - low) / (high - low) for line in ends]
    for i in range(1, len(at)):
        at[i] = max(at[i], at[i - 1] + _APART)
    over = max(0.0, at[-1] - 0.98)
    for line, height in zip(ends, at, strict=True):
        axes.annotate(
            line.name, (1.02, height - over), xycoords="axes fraction", ha="left", va="center", fontsize=8.5,
            color=line.colour, annotation_clip=False,
        )  # fmt: skip
