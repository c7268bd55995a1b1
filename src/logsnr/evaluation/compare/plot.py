"""The picture: RMSE, and FD where there is one, against evaluations per image; the best of each family stands out.

Every sampler is a grey dot; those far worse than the worst family's best lie above the frame.  A family has a colour:
filled marks and a line for the best of ours, hollow marks and a dashed one for the best of diffusers'; plans are black.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from logsnr.evaluation.compare.result import Comparison, Row
from logsnr.report.style import drawn, encoded, plain_ticks

COLOURS = {
    "DDIM": "#8a8a8a",
    "GE": "#c8553d",
    "Adams-Bashforth": "#b8860b",
    "PNDM": "#7a5ea8",
    "DEIS": "#3c8d5a",
    "DPM++": "#1f5fa8",
    "UniPC": "#2a9d9d",
    "Heun": "#c2569b",
    "universal": "#3b3b3b",
}


def plot(comparison: Comparison, form: Literal["svg", "png"]) -> bytes:
    """The picture's file; identical input gives identical bytes.

    Raises:
        LogsnrError: if matplotlib is not installed.
    """
    quantities = [("rmse", "RMSE to the teacher")]
    if comparison.features is not None:
        quantities.append(("frechet", f"FD (features: {comparison.features})"))

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, len(quantities), squeeze=False)[0]
        for one, (by, label) in zip(axes, quantities, strict=True):
            _panel(one, comparison, by, label)
        if comparison.teacher.frechet is not None:
            axes[-1].axhline(comparison.teacher.frechet.value, color="#444444", linewidth=1, linestyle=":")
            axes[-1].annotate(
                "teacher", (0.01, comparison.teacher.frechet.value), xycoords=("axes fraction", "data"),
                ha="left", va="bottom", fontsize=8, color="#444444",
            )  # fmt: skip
        entries: dict[str, Any] = {}
        for one in axes:
            for handle, name in zip(*one.get_legend_handles_labels(), strict=True):
                entries.setdefault(name, handle)
        figure.legend(entries.values(), entries.keys(), loc="outside right center", fontsize=9)

    return encoded(drawn(draw, width=1.9 + 4.6 * len(quantities), height=4.4, purpose="the plot"), form)


def _panel(axes: Any, comparison: Comparison, by: str, label: str) -> None:
    def value(row: Row) -> float | None:
        measured = getattr(row, by)
        return None if measured is None or measured.value <= 0 else float(measured.value)

    dots = [(row.evaluations, value(row)) for row in comparison.rows if value(row) is not None]
    axes.plot(*zip(*dots, strict=True), ".", color="#c9c9c9", markersize=4, zorder=1) if dots else None
    leaders = [comparison.best(budget, by) for budget in comparison.budgets]
    present = {key for best in leaders for key in best}
    known = [*COLOURS, *sorted({family for family, _ in present} - {*COLOURS, "plan"})]
    for family in known:
        for origin in ("logsnr", "diffusers"):
            rows = [best[family, origin] for best in leaders if (family, origin) in best]
            name = family if origin == "logsnr" else f"{family} in diffusers"
            _line(axes, rows, value, name, COLOURS.get(family, "#555555"), dashed=origin == "diffusers")
    for solver in dict.fromkeys(row.solver for row in comparison.rows if row.origin == "plan"):
        rows = [row for row in comparison.rows if row.origin == "plan" and row.solver == solver]
        _line(axes, rows, value, f"plan {solver}", "black", marker="*")
    ticks = list(comparison.budgets)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set(xlabel="network evaluations per image", ylabel=label)
    shown = [v for best in leaders for row in best.values() if (v := value(row)) is not None]
    if shown:
        axes.set_ylim(min(shown) / 1.5, max(shown) * 2)
    plain_ticks(axes)


def _line(
    axes: Any,
    rows: list[Row],
    value: Callable[[Row], float | None],
    name: str,
    colour: str,
    *,
    dashed: bool = False,
    marker: str = "o",
) -> None:
    points = sorted((row.evaluations, v) for row in rows if (v := value(row)) is not None)
    if points:
        x, y = zip(*points, strict=True)
        axes.plot(
            x, y, marker=marker, color=colour, label=name, zorder=3, linewidth=1 if dashed else 1.6,
            linestyle="--" if dashed else "-", markersize=9 if marker == "*" else 5,
            markerfacecolor="white" if dashed else colour,
        )  # fmt: skip
