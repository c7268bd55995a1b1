"""Training: an objective as other people's loops state it, turned into the one weighting that it is.

A loop draws noise levels with density p(lambda), and averages omega(lambda) ||F_hat - F*||^2 of its network's target F.
The error of eps is b_F times that of F (predictions.py), so what it minimises weights

    w(lambda) = p(lambda) omega(lambda) / b_F(lambda)^2
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from logsnr.noise import alpha_s_from_logsnr
from logsnr.objectives import WeightedELBO
from logsnr.predictions import Prediction
from logsnr.schedules import Adaptive, Discrete, Schedule
from logsnr.weightings import Custom, Implied, Weighting

Log = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """An objective, with how it is drawn.

    Attributes:
        name: what it is called.
        weighting: w.
        log_density: ln p of the noise levels; None where the source does not say.
        drawn: p in words.
        range: (lo, hi) log-SNR of the objective; an end may be infinite.
        sigma_data: standard deviation of the data that the source assumes.
        notes: what is known to be inconsistent, or lies outside of w and p.
    """

    name: str
    weighting: Weighting
    log_density: Log | None
    drawn: str
    range: tuple[float, float]
    sigma_data: float = 0.5
    notes: tuple[str, ...] = ()


def drawn_by(schedule: Schedule) -> Log:
    """ln p of a schedule; of a discrete table smoothed, so that w does not saw between two timesteps."""
    if not isinstance(schedule, Discrete):
        return schedule.log_density
    lo, hi = schedule.range
    n = len(schedule.table) - 1
    ends = -2 * schedule.table.sigmas.log()
    finite = ends[ends.isfinite()]
    centres = (0.5 * (finite[1:] + finite[:-1])).flip(0)
    heights = -(finite[:-1] - finite[1:]).flip(0).log() - torch.tensor(float(n)).log()

    def log_density(logsnr: Tensor) -> Tensor:
        x = logsnr.double().clamp(float(centres[0]), float(centres[-1]))
        i = torch.searchsorted(centres, x.contiguous(), right=True).sub(1).clamp(0, len(centres) - 2)
        part = (x - centres[i]) / (centres[i + 1] - centres[i])
        out = heights[i] * (1 - part) + heights[i + 1] * part
        # Zero terminal SNR: below the last finite level p falls as exp(lambda / 2).
        out = out + 0.5 * (logsnr - finite[-1]).clamp(max=0.0) if lo == -torch.inf else out
        return torch.where((logsnr >= lo) & (logsnr <= hi), out, -torch.inf)

    return log_density


def trained_by(objective: WeightedELBO) -> Trained:
    """An objective of ours; a table's own density as its weighting is smoothed with it."""
    weighting, schedule = objective.weighting, objective.schedule
    density = drawn_by(schedule)
    if isinstance(weighting, Implied) and isinstance(weighting.schedule, Discrete):
        weighting = weighting_of(drawn_by(weighting.schedule), weighting.prediction)
    return Trained(
        name=objective.name,
        weighting=weighting,
        log_density=density,
        drawn=f"adaptive: p ~ w q, q by {schedule.importance}" if isinstance(schedule, Adaptive) else repr(schedule),
        range=schedule.range,
        notes=("p adapts in training: shown is its start.",) if isinstance(schedule, Adaptive) else (),
    )


def weighting_of(log_density: Log, prediction: Prediction, log_factor: Log | None = None) -> Weighting:
    """p omega / b_F^2."""

    def log_w(logsnr: Tensor) -> Tensor:
        x = logsnr.double()
        b_F = prediction.eps_row(*alpha_s_from_logsnr(x))[1]
        out = log_density(x) - 2 * torch.as_tensor(b_F).abs().log()
        return out if log_factor is None else out + log_factor(x)

    return Custom(log_w, in_log=True)
