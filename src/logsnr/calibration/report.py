"""Report: what a plan is worth on noise that the search has not seen, and what no plan could bring.

The mean square of few samples is decided by those that end in another mode than the teacher's: so it comes with its
standard error, with the median, and with the share of samples that strayed (whose error is beyond the scale of
tempering, rollout.py).

At every step the way that is left to the teacher's state, r = z* - z, lies partly in the span of the estimates that the
plan has seen.  What lies outside no coefficients reach, not even a sample's own: where that share is near 1, levels and
rows are done, and only more evaluations help.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from logsnr.calibration.rollout import Rollout
from logsnr.calibration.trial import Trial
from logsnr.sampling.plan import Grid, Plan
from logsnr.sampling.teacher import teacher_ends, teacher_on

ROUNDING = 1e-5
"""Of a state: what is left of no more is none."""


def reported(trial: Trial) -> dict[str, Any]:
    """Errors on noise that nothing has seen, once the plan's hash is on record.

    Returns:
        `rmse` of the plan, its `stderr`, `median` RMSE of a sample and the share `strayed`; `alternatives`, the RMSE of
        the leading built-in solvers; `outside`, of each step the median share of what is left to the teacher's state
        that lies outside the span of the estimates (absent where errors count in features).
    """
    assert trial.best is not None
    plan = trial.best.plan
    trial.ledger.settle(plan.hash)
    trial.tell("report")
    trial.teach("report")
    others = {name: json_number(trial.rmse(other, "report")) for name, other in trial.leaders.items()}
    q = trial.squares(plan, "report")
    rmse = math.sqrt(float(q.mean()))
    found: dict[str, Any] = {
        "rmse": json_number(rmse),
        "stderr": json_number(float(q.std()) / (2 * rmse * math.sqrt(len(q))) if rmse > 0 else 0.0),
        "median": json_number(math.sqrt(float(q.median()))),
        "strayed": float((q > trial.scale).double().mean()),
        "alternatives": others,
    }
    if trial.metric is None:
        few = trial.settings.few
        found["outside"] = trial.ledger.recall(
            f"outside {few} {plan.hash}", plan.nfe * few, lambda: outside(trial, plan, few).tolist()
        )
    return found


def outside(trial: Trial, plan: Plan, few: int) -> Tensor:
    """Median share, step by step `[nfe]`, of z* - z outside the span of the estimates so far; on the first few of the
    fitting noises, `nfe` evaluations and the teacher's of them."""
    noises = trial.noises["fit"].first(few)
    grid = through(trial.teachers_plan.sigmas, plan.sigmas)
    wanted, states = set(plan.sigmas[1:]), {}

    def note(step: Any) -> None:
        if step.sigma in wanted:
            states[step.sigma] = step.z

    states[0.0] = teacher_ends(
        trial.teacher, teacher_on(grid), noises.noise, noises.cond, chunk=trial.teacher_chunk, callback=note
    )
    parts, at = [], 0
    for part in noises.chunks(trial.chunk):
        run = Rollout(trial.ledger.meter, plan.basis, part)
        run.run(plan)
        targets = [states[sigma][at : at + len(part)] for sigma in plan.sigmas[1:]]
        parts.append(torch.stack([beyond(target, run, i + 1) for i, target in enumerate(targets)]))
        at += len(part)
    return torch.cat(parts, 1).median(1).values.cpu()


def beyond(target: Tensor, run: Rollout, step: int) -> Tensor:
    """Share of each sample `[B]` of the way from a rollout's state number `step` to its target that lies outside the
    span of the estimates before it; 0 where no way is left."""
    left = (target - run.states[step]).flatten(1).double()
    basis = torch.linalg.qr(torch.stack([value.flatten(1) for value in run.values[:step]], -1).double())[0]
    outside = left - (basis @ (basis.mT @ left.unsqueeze(-1))).squeeze(-1)
    size = left.square().sum(1)
    exact = size <= ROUNDING**2 * target.flatten(1).double().square().sum(1)
    return torch.where(exact, 0.0, outside.square().sum(1) / size.clamp(min=1e-300))


def through(grid: Grid, levels: Grid) -> Grid:
    """A fine grid moved to pass through levels: each takes the place of the nearest one, if no other did; the ends
    stay."""
    fine = {sigma: sigma for sigma in grid}  # where they were -> where they are
    extra = []
    for level in levels:
        if level not in fine.values():
            nearest = min((s for s in grid[1:] if s > 0), key=lambda s: abs(math.log(s / level)))
            if fine[nearest] == nearest:
                fine[nearest] = level
            else:
                extra.append(level)
    return tuple(sorted({*fine.values(), *extra}, reverse=True))


def json_number(value: float) -> float | str:
    """A float that JSON can hold."""
    return value if math.isfinite(value) else str(value)
