"""Figures: measured curves drawn as SVG text, in one style."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from logsnr.report.style import COLOURS, FAINT, LOGSNR, drawn, encoded, plain_ticks
from logsnr.schedules import Schedule
from logsnr.weightings import Weighting

LAYOUT = "constrained"
"""Margins are found, so that no label is cut; two thirds of the time that a figure takes."""
Curve = tuple[Sequence[float], Sequence[float]]


def _svg(draw: Callable[[Any], None]) -> str:
    """Draw on fresh axes and return the SVG element; identical input gives identical text."""
    text = encoded(drawn(lambda figure: draw(figure.subplots()), layout=LAYOUT), "svg").decode()
    return text[text.index("<svg") :]


def loss_against_logsnr(curves: Mapping[str, Curve], *, sigma_data: float) -> str:
    """E||eps_hat - eps||^2 / D against log-SNR, beside the denoiser that knows only the data's standard deviation."""

    def draw(axes: Any) -> None:
        lo = min(min(x) for x, _ in curves.values())
        hi = max(max(x) for x, _ in curves.values())
        logsnr = torch.linspace(lo, hi, 200, dtype=torch.float64)
        for (name, (x, y)), colour in zip(curves.items(), COLOURS, strict=False):
            axes.plot(x, y, "o-", markersize=3, color=colour, label=name)
        ceiling = torch.sigmoid(logsnr + 2 * torch.tensor(sigma_data).log())
        axes.plot(logsnr, ceiling, "--", color=FAINT, label="knows only sigma_data")
        axes.set(xlabel=LOGSNR, ylabel="error of eps per dimension")
        axes.set_ylim(bottom=0)
        axes.legend()

    return _svg(draw)


def weighting_and_density(weighting: Weighting, schedule: Schedule) -> str:
    """w(logsnr), what the loss counts, and p(logsnr), where training looks; each scaled to a peak of 1."""

    def draw(axes: Any) -> None:
        lo, hi = schedule.range
        logsnr = torch.linspace(max(lo, -20), min(hi, 20), 400, dtype=torch.float64)
        for name, log, colour in (
            ("weighting w, what counts", weighting.log(logsnr), COLOURS[1]),
            ("density p, where training looks", schedule.log_density(logsnr), COLOURS[0]),
        ):
            axes.plot(logsnr, (log - log.max()).exp(), color=colour, label=name)
        axes.set(xlabel=LOGSNR, ylabel="relative to its peak", ylim=(-0.03, 1.35))
        axes.legend(loc="upper right")

    return _svg(draw)


def against_nfe(series: Mapping[str, Curve], *, ylabel: str, floor: tuple[str, float] | None = None) -> str:
    """One quality against network evaluations per image, a line per sampler, both axes logarithmic."""

    def draw(axes: Any) -> None:
        for (name, (x, y)), colour in zip(series.items(), COLOURS, strict=False):
            axes.plot(x, y, "o-", color=colour, label=name)
        if floor is not None:
            axes.axhline(floor[1], color=FAINT, linestyle="--", label=floor[0])
        ticks = sorted({v for x, _ in series.values() for v in x})
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        axes.set(xlabel="network evaluations per image", ylabel=ylabel)
        plain_ticks(axes)
        axes.legend()

    return _svg(draw)


def training_curve(steps: Sequence[float], losses: Sequence[float]) -> str:
    """Training loss per step and its running mean, on a logarithmic axis."""

    def draw(axes: Any) -> None:
        axes.plot(steps, losses, color=COLOURS[0], alpha=0.3, linewidth=0.8)
        window = max(1, len(losses) // 30)
        kernel = torch.ones(window, dtype=torch.float64) / window
        smooth = torch.tensor(losses, dtype=torch.float64).unfold(0, window, 1) @ kernel
        axes.plot(steps[window - 1 :], smooth, color=COLOURS[0])
        axes.set_yscale("log")
        axes.set(xlabel="step", ylabel="weighted loss, nats per dimension")
        plain_ticks(axes)

    return _svg(draw)


def against_logsnr(
    series: Mapping[str, Curve],
    *,
    ylabel: str,
    log: bool = False,
    shade: Sequence[tuple[float, float]] = (),
    marked: tuple[float, float] | None = None,
    bars: Mapping[str, Sequence[float]] | None = None,
    level: tuple[str, float] | None = None,
    bottom: float | None = None,
    top: float = 0.0,
) -> str:
    """Curves over noise levels, on one axis of log-SNR; what is not finite is left out.

    Args:
        series: name -> (sigmas, values).
        ylabel: what the values are.
        log: a logarithmic vertical axis.
        shade: ranges of sigma to grey out.
        marked: a range of sigma to mark in green.
        bars: name -> half lengths of bars around the values of a series.
        level: a horizontal line and its name.
        bottom: lower end of the vertical axis.
        top: where the vertical axis ends at least.
    """

    def draw(axes: Any) -> None:
        for (name, (sigmas, values)), colour in zip(series.items(), COLOURS, strict=False):
            half = (bars or {}).get(name, [0.0] * len(values))
            points = [
                (-2 * math.log(s), v, e) for s, v, e in zip(sigmas, values, half, strict=True) if math.isfinite(v)
            ]
            if points:
                x, y, e = zip(*points, strict=True)
                axes.plot(x, y, "o-", markersize=3, color=colour, label=name)
                if any(e):
                    axes.errorbar(x, y, e, fmt="none", ecolor=colour, elinewidth=1, capsize=2)
        left, right = axes.get_xlim()
        for low, high in shade:
            a, b = (-2 * math.log(s) if 0 < s < math.inf else 2000.0 * (1 if s == 0 else -1) for s in (high, low))
            axes.axvspan(max(a, left), min(b, right), color="#dddddd", alpha=0.5, linewidth=0)
        if marked is not None:
            axes.axvspan(*(-2 * math.log(s) for s in reversed(marked)), color="#3c8d5a", alpha=0.1, linewidth=0)
        axes.set_xlim(left, right)
        if level is not None:
            axes.axhline(level[1], color=FAINT, linestyle="--", label=level[0])
        if log:  # before the limits are read: a linear axis begins below 0
            axes.set_yscale("log")
            plain_ticks(axes)
        axes.set_ylim(top=max(top, axes.get_ylim()[1]))
        if bottom is not None:
            axes.set_ylim(bottom=bottom)
        axes.set(xlabel=LOGSNR, ylabel=ylabel)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()

    return _svg(draw)


def against_factor(factors: Sequence[float], values: Sequence[float], best: float) -> str:
    """Error of a model that is told k sigma, over its error at k = 1; a line marks the k of least error."""

    def draw(axes: Any) -> None:
        axes.plot(factors, values, "o-", color=COLOURS[0], label="measured")
        axes.axvline(1.0, color=FAINT, linestyle="--", label="as labelled")
        if math.isfinite(best):
            axes.axvline(best, color=COLOURS[1], label=f"least error, k = {best:.3f}")
        axes.set_xscale("log")
        axes.set_xticks(factors, [f"{k:g}" for k in factors])
        axes.minorticks_off()
        axes.set(xlabel="told k sigma", ylabel="squared error, relative")
        axes.legend()

    return _svg(draw)
