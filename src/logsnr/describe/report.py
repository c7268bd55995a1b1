"""Report: an objective measured, on the levels where it has any weight.

emphasis    w(lambda) r(lambda) / int w r,  r = sigmoid(lambda + 2 ln sigma_data), the error of the best denoiser
            that knows only the data's standard deviation: the share of the loss that each level has, about where
            training starts.  Unlike w it has a unit, and no level counts at which nobody can err.
distance    1/2 int |emphasis - emphasis'| dlambda in [0, 1], between two objectives
monotone    w never rises: the objective is the ELBO of data with added noise, its log-SNR drawn from -w' and an
            atom w(hi)/w(lo) of data with the least noise (2303.00848, Theorem 1)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logsnr.describe.training import Trained, trained_by
from logsnr.objectives import WeightedELBO, objectives
from logsnr.weightings import Weighting

REACH = (-20.0, 20.0)
"""Where infinite ranges are cut, as the presets cut theirs."""
POINTS = 4001
SHOWN = (-15.0, -10.0, -5.0, -2.0, 0.0, 2.0, 5.0, 10.0, 15.0)


@dataclass(frozen=True, kw_only=True)
class ObjectiveReport:
    """What an objective is.

    Attributes:
        name: what it is called.
        drawn: how noise levels are drawn, in words.
        range: (lo, hi) log-SNR, cut at +-20.
        sigma_data: standard deviation of the data behind `emphasis`.
        logsnr: levels `[4001]`, evenly over the range.
        w: weighting at them, 1 at log-SNR 0 (or at its largest, if it is 0 there).
        p: density of the drawn levels; nan where the source does not say.
        emphasis: share of the loss per unit of log-SNR.
        monotone: whether w never rises.
        rises: (lo, hi) of the levels between which w rises, None if monotone.
        negative: mass of the negative part of p_w, relative to its whole positive part; 0 if monotone.
        atom: share of data at the least noise, where monotone.
        augmentation: log-SNRs below which .1, .5 and .9 of the added noise lies, where monotone.
        presets: (name, distance), nearest first.
        notes: what is known to be inconsistent, or lies outside of w and p.
    """

    name: str
    drawn: str
    range: tuple[float, float]
    sigma_data: float
    logsnr: Tensor
    w: Tensor
    p: Tensor
    emphasis: Tensor
    monotone: bool
    rises: tuple[float, float] | None
    negative: float
    atom: float | None
    augmentation: tuple[float, float, float] | None
    presets: tuple[tuple[str, float], ...]
    notes: tuple[str, ...]

    def verdict(self) -> str:
        """One sentence: whether it is an ELBO, and of what."""
        hi = self.range[1]
        if self.monotone and self.atom is not None and self.augmentation is not None:
            if self.atom > 1 - 1e-9:
                return f"An ELBO of the data with noise of log-SNR {hi:g}: maximum likelihood."
            a, b, c = self.augmentation
            return (
                f"An ELBO, of data with noise added: log-SNR {b:.2f} in the median ({a:.2f} ... {c:.2f} for the middle "
                f"80 %), and {self.atom:.3g} of the data with the least noise, {hi:g}."
            )
        assert self.rises is not None
        return (
            f"No ELBO: w rises between log-SNR {self.rises[0]:.2f} and {self.rises[1]:.2f}, so that its mixture of "
            f"noise levels is signed (negative mass {self.negative:.3g} of the positive)."
        )

    def rows(self) -> list[tuple[float, float, float, float]]:
        """(log-SNR, w, p, share of the loss below this level) at a few levels in range."""
        below = torch.cat([self.emphasis.new_zeros(1), torch.cumulative_trapezoid(self.emphasis, self.logsnr)])
        levels = [x for x in SHOWN if self.range[0] <= x <= self.range[1]]
        places = [int((self.logsnr - x).abs().argmin()) for x in levels]
        return [(x, float(self.w[i]), float(self.p[i]), float(below[i])) for x, i in zip(levels, places, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, the curves at every hundredth level; null for what does not exist."""
        step = slice(None, None, (POINTS - 1) // 40)

        def numbers(values: Tensor) -> list[float | None]:
            return [x if math.isfinite(x) else None for x in values[step].tolist()]

        return {
            "name": self.name,
            "drawn": self.drawn,
            "logsnr_range": list(self.range),
            "sigma_data": self.sigma_data,
            "monotone": self.monotone,
            "verdict": self.verdict(),
            "rises": self.rises and list(self.rises),
            "negative_mass": self.negative,
            "atom": self.atom,
            "augmentation_logsnr": self.augmentation and list(self.augmentation),
            "presets": dict(self.presets),
            "notes": list(self.notes),
            "curves": {name: numbers(getattr(self, name)) for name in ("logsnr", "w", "p", "emphasis")},
        }


def describe(objective: Trained | WeightedELBO, *, sigma_data: float | None = None) -> ObjectiveReport:
    """Measure an objective.

    Args:
        objective: a `WeightedELBO`, or what `resolve` found.
        sigma_data: standard deviation of the data; None for what the source assumes.

    Raises:
        ValueError: if w is zero everywhere, negative or not finite in range, or sigma_data is not positive.
    """
    trained = trained_by(objective) if isinstance(objective, WeightedELBO) else objective
    sd = trained.sigma_data if sigma_data is None else sigma_data
    if not 0 < sd < math.inf:
        raise ValueError(f"sigma_data = {sd}: give a positive standard deviation, e.g. 0.5")
    lo, hi = max(trained.range[0], REACH[0]), min(trained.range[1], REACH[1])
    x = torch.linspace(lo, hi, POINTS, dtype=torch.float64)
    log_w = trained.weighting.log(x)
    bad = log_w.isnan() | (log_w == math.inf)
    if bool(bad.any()):
        raise ValueError(
            f"{trained.name}: w is negative or not finite at log-SNR {float(x[bad][0]):.2f}; cut the range there"
        )
    if not bool((log_w > -math.inf).any()):
        raise ValueError(f"{trained.name}: w is zero everywhere on [{lo:g}, {hi:g}]: there is nothing to learn")
    emphasis = trained.weighting.emphasis(x, sd)
    monotone = trained.weighting.is_monotone(lo, hi)
    share = (log_w - log_w.max()).exp()
    steps = share.diff()
    rising = (steps > 1e-12).nonzero()[:, 0]
    falls = float(-steps.clamp(max=0).sum() + share[-1])
    zero = float(trained.weighting.log(0.0)) if lo <= 0 <= hi else -math.inf
    return ObjectiveReport(
        name=trained.name,
        drawn=trained.drawn,
        range=(lo, hi),
        sigma_data=sd,
        logsnr=x,
        w=(log_w - (zero if math.isfinite(zero) else float(log_w.max()))).exp(),
        p=torch.full_like(x, math.nan) if trained.log_density is None else trained.log_density(x).exp(),
        emphasis=emphasis,
        monotone=monotone,
        rises=None if monotone or not len(rising) else (float(x[rising[0]]), float(x[rising[-1] + 1])),
        negative=0.0 if monotone else float(steps.clamp(min=0).sum()) / falls,
        atom=float(share[-1] / share[0]) if monotone else None,
        augmentation=_quantiles(x, share / share[0]) if monotone else None,
        presets=_nearest(trained, sd),
        notes=trained.notes,
    )


def _quantiles(x: Tensor, above: Tensor) -> tuple[float, float, float]:
    """Log-SNRs below which .1, .5 and .9 of p_w lies: P(log-SNR >= l) = w(l)/w(lo)."""
    at = [min(int((above > 1 - q).sum()), len(x) - 1) for q in (0.1, 0.5, 0.9)]
    return float(x[at[0]]), float(x[at[1]]), float(x[at[2]])


def _nearest(trained: Trained, sigma_data: float) -> tuple[tuple[str, float], ...]:
    """Distances to all presets, on [-20, 20]; an objective has no emphasis outside its range."""
    grid = torch.linspace(*REACH, POINTS, dtype=torch.float64)

    def on_grid(weighting: Weighting, ends: tuple[float, float]) -> Tensor:
        inside = (grid >= ends[0]) & (grid <= ends[1])
        out = torch.zeros_like(grid)
        out[inside] = weighting.emphasis(grid[inside], sigma_data)
        return out

    own = on_grid(trained.weighting, trained.range)
    found = []
    for name in objectives:
        preset = trained_by(objectives[name])
        other = on_grid(preset.weighting, preset.range)
        found.append((name, float(0.5 * torch.trapezoid((own - other).abs(), grid))))
    return tuple(sorted(found, key=lambda pair: pair[1]))
