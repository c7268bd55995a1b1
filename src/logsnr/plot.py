"""Plot: samples, runs, plans and objectives as matplotlib figures, for notebooks and files.

    ls.plot.images(ls.sample(denoiser, 10, n=16, generator=generator))
    ls.plot.trajectory(ls.trajectory(denoiser, 10, n=4, generator=generator)).savefig("run.png")
    ls.plot.plan(ls.solvers.ge(grid))
    ls.plot.objective("vdm++/sigmoid")

Every function returns a `matplotlib.figure.Figure` of its own, which a notebook shows and `.savefig` writes; none
touches pyplot.  Figures of reports have the same style (report/style.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from logsnr.objectives import WeightedELBO, objectives
from logsnr.pixels import Pixels
from logsnr.report.style import COLOURS, FAINT, LOGSNR, drawn, plain_ticks
from logsnr.sampling import Plan, Trajectory

REACH = (-20.0, 20.0)
"""Log-SNRs between which an objective of infinite range is drawn."""


def images(x: Tensor, *, pixels: Pixels | None = None, columns: int | None = None, title: str = "") -> Any:
    """A sheet of images.

    Args:
        x: `[N, C, H, W]` or one `[C, H, W]`, 1 or 3 channels: samples in [-1, 1], or stored images (uint8).
        pixels: their codec, of another box or other than 256 grey levels (`denoiser.pixels`).
        columns: images per row; by default as many as rows.
        title: over the sheet.

    Raises:
        ValueError: if x is no batch of images.
        LogsnrError: if matplotlib is not installed.
    """
    shown = _shown(x if x.ndim == 4 else x.unsqueeze(0), pixels)
    columns = min(columns or math.ceil(math.sqrt(len(shown))), len(shown))
    rows = -(-len(shown) // columns)

    def draw(figure: Any) -> None:
        sheet = figure.subplots(rows, columns, squeeze=False)
        for axes in sheet.flat:
            axes.set_axis_off()
        for axes, image in zip(sheet.flat, shown, strict=False):
            _picture(axes, image)
        _close(figure)
        if title:
            figure.suptitle(title)

    side = max(0.7, min(1.6, 8 / columns))
    return drawn(draw, width=side * columns, height=side * rows + (0.4 if title else 0), purpose="ls.plot")


def trajectory(
    run: Trajectory | Sequence[Tensor], *, samples: int = 4, columns: int = 8, pixels: Pixels | None = None
) -> Any:
    """A run, from noise to sample: what the network takes each sample for, level by level.

    Images are rows of estimates of x0, a row per sample, noise level by noise level.  Points of a plane are paths of
    states z, noise as crosses and ends as dots, over their estimates of x0.

    Args:
        run: from `ls.trajectory`; or estimates of x0 `[B, *shape]`, one per step.
        samples: rows of images at most (of points, all are drawn).
        columns: images per row, evenly chosen among the steps, first and last included.
        pixels: as in `images`.

    Raises:
        ValueError: if samples are neither images nor points of a plane.
        LogsnrError: if matplotlib is not installed.
    """
    estimates = list(run if isinstance(run, Sequence) else run.x0)
    if not estimates:
        raise ValueError("a run of no steps: give at least one estimate of x0")
    if estimates[0].shape[1:] == (2,):
        points = torch.stack(estimates)
        return _paths(points if isinstance(run, Sequence) else run.z, points)
    titles = [f"step {i}" for i in range(1, len(estimates) + 1)]
    if not isinstance(run, Sequence):
        titles = [f"σ = {sigma:.3g}" for sigma in run.sigmas[:-1]]
    count = min(columns, len(estimates))
    chosen = sorted({round(i * (len(estimates) - 1) / max(count - 1, 1)) for i in range(count)})
    rows = [_shown(estimates[i][:samples], pixels) for i in chosen]

    def draw(figure: Any) -> None:
        sheet = figure.subplots(len(rows[0]), len(chosen), squeeze=False)
        for column, (i, column_images) in enumerate(zip(chosen, rows, strict=True)):
            sheet[0][column].set_title(titles[i], fontsize=9)
            for axes, image in zip(sheet[:, column], column_images, strict=True):
                axes.set_axis_off()
                _picture(axes, image)
        _close(figure)

    return drawn(draw, width=1.1 * len(chosen), height=1.1 * len(rows[0]) + 0.3, purpose="ls.plot")


def _paths(z: Tensor, x0: Tensor) -> Any:
    z, x0 = z.detach().cpu().double(), x0.detach().cpu().double()

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot(*z.unbind(-1), color=COLOURS[0], alpha=0.35, linewidth=0.8)
        axes.plot(*x0.flatten(0, 1).unbind(-1), ".", color=FAINT, alpha=0.3, markersize=3, label="estimates of x0")
        axes.plot(*z[0].unbind(-1), "x", color=COLOURS[1], markersize=4, label="noise")
        axes.plot(*z[-1].unbind(-1), "o", color=COLOURS[0], markersize=4, label="end")
        axes.set_aspect("equal", adjustable="datalim")
        axes.legend(loc="best")

    return drawn(draw, width=5.0, height=5.0, purpose="ls.plot")


def plan(plan: Plan) -> Any:
    """A plan: its noise levels above, and below its rows, the coefficient of each estimate at each step.

    Raises:
        LogsnrError: if matplotlib is not installed.
    """
    depth = max(map(len, plan.rows))
    table = torch.full((depth, plan.nfe), math.nan, dtype=torch.float64)
    for i, row in enumerate(plan.rows):
        table[: len(row), i] = torch.tensor(row, dtype=torch.float64)
    most, frame = max(2.0, float(table.nan_to_num().abs().max())), (-0.5, plan.nfe - 0.5, depth, 0)

    def draw(figure: Any) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, max(0.5, 0.3 * depth)))
        _levels(upper, plan.sigmas)
        noisy = [
            (i, low, high)
            for i, (low, high) in enumerate(zip(plan.sigma_down or (), plan.sigmas[1:], strict=False), 1)
            if 0 < low < high
        ]
        if noisy:
            at, low, high = zip(*noisy, strict=True)
            upper.vlines(at, low, high, color=COLOURS[1], linewidth=1)
            upper.plot(at, low, "v", color=COLOURS[1], markersize=4, label="before noise")
            upper.legend()
        upper.set(ylabel="σ", title=_named(plan))
        lower.imshow(table, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto", extent=frame)
        if plan.nfe <= 12:
            for i, row in enumerate(plan.rows):
                for j, c in enumerate(row):
                    dark = abs(c) > 0.6 * most
                    lower.text(i, j + 0.5, f"{c:.3g}", ha="center", va="center", fontsize=8, color="w" if dark else "k")
        lower.set_yticks([j + 0.5 for j in range(depth)], ["now", *(f"{j} before" for j in range(1, depth))])
        lower.set_xticks(range(0, plan.nfe + 1, max(1, plan.nfe // 10)))
        lower.set(xlabel="step", ylabel=f"{plan.basis} rows")
        lower.grid(visible=False)
        upper.set_xlim(-0.5, plan.nfe + 0.5)

    return drawn(draw, width=max(5.0, min(9.0, 0.7 * plan.nfe + 1.5)), height=3.4 + 0.35 * depth, purpose="ls.plot")


def _levels(axes: Any, sigmas: Sequence[float]) -> None:
    """Levels on a logarithmic axis; 0 and inf as arrows beyond its ends, named."""
    finite = [(i, s) for i, s in enumerate(sigmas) if 0 < s < math.inf]
    colour, low, high = COLOURS[0], min((s for _, s in finite), default=1.0), max((s for _, s in finite), default=1.0)
    axes.plot([i for i, _ in finite], [s for _, s in finite], "o-", color=colour, markersize=4)
    axes.set_yscale("log")
    for i, s in enumerate(sigmas):
        if s in (0, math.inf):
            at = low / 2 if s == 0 else high * 2
            axes.plot([i], [at], "v" if s == 0 else "^", color=colour, markersize=5, clip_on=False)
            axes.annotate(f"{s:g}", (i, at), (6, 0), textcoords="offset points", va="center", fontsize=8, color=colour)
    if high / low < 100:
        plain_ticks(axes)


def _named(plan: Plan) -> str:
    solver = plan.meta.get("solver")
    evaluations = f"{plan.nfe} evaluation" + ("s" if plan.nfe > 1 else "")
    return f"{solver}, {evaluations}" if solver else evaluations


def objective(objective: WeightedELBO | str, *, sigma_data: float = 0.5) -> Any:
    """An objective: its weighting w above, and below the density p of its draws and the emphasis.

    The emphasis is where the loss lies: w sigmoid(lambda + 2 ln sigma_data), the share of each noise level in the loss
    of a denoiser that knows the data's standard deviation alone.

    Args:
        objective: or the name of a published one.
        sigma_data: standard deviation of the data.

    Raises:
        LogsnrError: if there is no objective of that name, or matplotlib is not installed.
    """
    found = objectives[objective] if isinstance(objective, str) else objective
    lo, hi = max(found.schedule.range[0], REACH[0]), min(found.schedule.range[1], REACH[1])
    x = torch.linspace(lo, hi, 2001, dtype=torch.float64)
    log_w = found.weighting.log(x)
    w = (log_w - (found.weighting.log(0.0) if lo <= 0 <= hi else log_w.max())).exp()
    return curves(x, w, found.schedule.log_density(x).exp(), found.weighting.emphasis(x, sigma_data), title=found.name)


def curves(logsnr: Tensor, w: Tensor, p: Tensor, emphasis: Tensor, *, title: str) -> Any:
    """The figure of `objective`, of measured curves `[n]`; nan in p for a density that is not known."""
    x = logsnr.tolist()

    def draw(figure: Any) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True)
        upper.semilogy(x, w.clamp(min=1e-12).tolist(), color=COLOURS[0])
        top = float(w.max())
        upper.set_ylim(max(top * 1e-8, float(w.min()) / 3, 1e-12), top * 3)
        upper.set(ylabel="w, 1 at log-SNR 0" if x[0] <= 0 <= x[-1] else "w, largest 1", title=title)
        lower.plot(x, emphasis.tolist(), color=COLOURS[0], label="emphasis: share of the loss")
        if not bool(p.isnan().all()):
            lower.plot(x, p.tolist(), "--", color=COLOURS[1], label="p: drawn")
        lower.set(xlabel=LOGSNR, ylabel="per unit of log-SNR")
        lower.set_ylim(bottom=0)
        lower.legend()

    return drawn(draw, width=6.4, height=4.8, purpose="ls.plot")


def _shown(x: Tensor, pixels: Pixels | None) -> list[Tensor]:
    """Images `[H, W]` or `[H, W, 3]` in [0, 1]."""
    if x.ndim != 4 or x.shape[1] not in (1, 3) or len(x) == 0:
        raise ValueError(
            f"images of shape {tuple(x.shape)}: give at least one, [N, 1 or 3, H, W]; latents by denoiser.decode(x)"
        )
    x = x.detach().cpu()
    codec = pixels or Pixels()
    low, high = codec.box
    unit = (x.float() - low) / (high - low) if x.is_floating_point() else x.float() / (codec.grey_levels - 1)
    return [image.squeeze(-1) for image in unit.clamp(0, 1).permute(0, 2, 3, 1)]


def _picture(axes: Any, image: Tensor) -> None:
    axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def _close(figure: Any) -> None:
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
