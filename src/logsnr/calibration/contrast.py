"""Contrast: the last step brings back the variance that least squares smoothes away.

What a few-step plan cannot know it makes smooth, and its samples vary less than the teacher's.  The end is linear in
the last step's numbers w, the state's own weight among them, x = X w, so the least squares that keep the teacher's
variance about the mean image

    min_w  || X w - T ||^2 + ridge || w - w_0 ||^2    subject to    w^T G_c w = || T - mean T ||^2,   G_c = X_c^T X_c

(c: less the mean over samples) are one equation per multiplier, (G - mu G_c + ridge) w = X^T T + ridge w_0, and
the variance grows with mu: bisection.  It costs one rollout, and the error grows by parts of a percent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from logsnr.calibration.rollout import Noises, Rollout
from logsnr.calibration.rows import RIDGE
from logsnr.calibration.trial import Trial
from logsnr.denoiser import Denoiser
from logsnr.sampling.loop import updates
from logsnr.sampling.plan import Plan

DEARER = 1.01
"""How much larger the error on the selection noise may be for it."""
MOST = 0.999
"""Of the multiplier: at 1 nothing holds the centred part."""


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Products of the last step's columns and the teacher's ends, and of both less their means over samples."""

    gram: Tensor
    pull: Tensor
    centred: Tensor
    square: float
    variance: float


def contrasted(trial: Trial) -> None:
    """Offer the best plan with a last step of the teacher's contrast, and take it unless its error is larger than that
    of the plan itself by more than a percent; one rollout and one selection, which the budget has set aside."""
    best, settings = trial.best, trial.settings
    if best is None or best.how["from"] == "alternative" or not settings.contrasts:
        return
    trial.ledger.budget = math.inf
    trial.tell("contrast")
    plan = best.plan

    def fit() -> list[Any]:
        found = last_step(moments(trial.ledger.meter, plan, trial.noises["fit"], trial.chunk), weights_of(plan))
        return [] if found is None else found.tolist()

    found = trial.ledger.recall(f"contrast {RIDGE} {plan.hash}", plan.nfe * settings.n, fit)
    if found:
        trial.prefer(with_last(plan, found), {**best.how, "contrast": True}, DEARER)


def weights_of(plan: Plan) -> Tensor:
    """The last step's numbers: the factor on the state, then the row."""
    keep = 1.0 if plan.keep is None else plan.keep[-1]
    return torch.tensor([keep, *plan.rows[-1]], dtype=torch.float64)


def with_last(plan: Plan, weights: list[float]) -> Plan:
    """The plan with another last step."""
    before = (1.0,) * (plan.nfe - 1) if plan.keep is None else plan.keep[:-1]
    return replace(plan, rows=(*plan.rows[:-1], tuple(weights[1:])), keep=(*before, weights[0]))


def moments(denoiser: Denoiser, plan: Plan, noises: Noises, chunk: int) -> Moments:
    """Of a plan's last step, along its own rollout; `nfe` evaluations of the noises."""
    row = plan.rows[-1]
    # (keep, gain) of the last step in the plan's own basis, whatever its row: a factor other than 1 keeps it there
    step = updates(replace(plan, rows=(*plan.rows[:-1], (2.0,)), keep=None))[-1]
    size, n, dim = len(row) + 1, len(noises), denoiser.dim
    gram, pull = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    sums, ends, square = torch.zeros(size, dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64), 0.0
    for part in noises.chunks(chunk):
        run = Rollout(denoiser, plan.basis, part)
        steps = updates(plan)
        for i, sigma in enumerate(plan.sigmas[:-1]):
            run.evaluate(sigma)
            if i < plan.nfe - 1:
                run.advance(steps[i])
        columns = [step.keep * run.states[-1], *(step.weights[0] / 2 * run.values[-1 - j] for j in range(len(row)))]
        x = torch.stack([column.flatten(1).double() for column in columns]).cpu()
        t = part.end.flatten(1).double().cpu()
        flat = x.flatten(1)
        gram += flat @ flat.T
        pull += flat @ t.flatten()
        square += float(t.square().sum())
        sums += x.sum(1)
        ends += t.sum(0)
    return Moments(
        gram=gram,
        pull=pull,
        centred=gram - sums @ sums.T / n,
        square=square,
        variance=square - float(ends.square().sum()) / n,
    )


def last_step(found: Moments, prior: Tensor) -> Tensor | None:
    """The last step's numbers of least error among those with the teacher's variance; None if there are none.

    Args:
        found: of the columns.
        prior: the numbers to stay near to, by `RIDGE` of the error that they have.
    """
    error = found.square - 2 * float(prior @ found.pull) + float(prior @ found.gram @ prior)
    # a step to 0 keeps no state in the basis x0: its column is 0, and its factor stays
    strength = max(RIDGE * error, 1e-12 * float(found.gram.diagonal().max()))
    ridge = strength * torch.eye(len(prior), dtype=torch.float64)

    def solved(mu: float) -> tuple[Tensor, float]:
        w = torch.linalg.solve(found.gram - mu * found.centred + ridge, found.pull + ridge @ prior)
        return w, float(w @ found.centred @ w) - found.variance

    low, high = -10.0, MOST
    if not (solved(low)[1] < 0 < solved(high)[1]):
        return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if solved(middle)[1] < 0 else (low, middle)
    w = solved((low + high) / 2)[0]
    return w if bool(w.isfinite().all()) else None
