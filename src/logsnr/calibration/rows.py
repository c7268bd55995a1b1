"""Rows by least squares: the best coefficients of each step, along the student's own rollout.

For fixed sigmas the state after step i is linear in its row c,

    z_{i+1}(c) = keep z_i + gain sum_j c_j e_{i-j},

so the row that lands nearest the teacher's state is a linear problem in a handful of unknowns,

    min_c  || z_{i+1}(c) - z*_{i+1} ||^2 / || residual of the prior row ||^2 + strength || c - c_prior ||^2,

solved in float64 from Gram matrices.  The next row is fitted from where this one lands: the rows repair each other.
Several models can share a row (universal plans): the first term is then its mean over them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from logsnr.calibration.rollout import Noises, Rollout, end_squares
from logsnr.calibration.teacher import Cache
from logsnr.calibration.trial import Trial, as_tensor
from logsnr.denoiser import Denoiser
from logsnr.sampling.loop import updates
from logsnr.sampling.plan import Basis, Grid, Plan
from logsnr.sampling.solvers import ge

RIDGE = 1e-3
"""Strength of the pull towards the prior, relative to the error of the prior's own row."""


def prior_rows(sigmas: Grid, history: int, basis: Basis) -> Plan:
    """Gradient estimation with gamma 1.5 (gamma 1 without history), each row as long as its history, zeros beyond."""
    plan = ge(sigmas, 1.5 if history else 1.0, basis)
    return Plan(sigmas, tuple(pad(row, min(i, history) + 1) for i, row in enumerate(plan.rows)), basis)


def lengthened(plan: Plan, history: int) -> Plan:
    """The same plan, its rows with zeros up to a history."""
    return replace(plan, rows=tuple(pad(row, max(len(row), min(i, history) + 1)) for i, row in enumerate(plan.rows)))


def pad(row: Sequence[float], length: int) -> tuple[float, ...]:
    """A row with zeros up to a length."""
    return (*row, *(0.0,) * (length - len(row)))


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What rows are fitted to: one model on its way from noise to the teacher's states.

    Attributes:
        denoiser: the model.
        prior: levels, row lengths, and the rows to stay near to.
        noises: where it starts.
        targets: the teacher's states z at `prior.sigmas[1:]`, each `[N, *shape]`.
        share: what it counts for among several.
    """

    denoiser: Denoiser
    prior: Plan
    noises: Noises
    targets: Sequence[Tensor]
    share: float = 1.0


def fit_rows(lessons: Sequence[Lesson], strength: float, chunk: int) -> tuple[list[Plan], list[Tensor]]:
    """The rows of least squares, the same for all lessons: each lesson's levels with them, and where each ends
    `[N, *shape]`; `nfe` evaluations of all noises.

    Args:
        lessons: of one basis and one set of prior rows, their levels their own.  Each counts by its share, and by what
            part of its own residual is left.
        strength: of the pull towards the prior; 0 for none.
        chunk: samples per call of a denoiser.
    """
    plans, total = [lesson.prior for lesson in lessons], sum(lesson.share for lesson in lessons)
    runs = [[Rollout(one.denoiser, one.prior.basis, part) for part in one.noises.chunks(chunk)] for one in lessons]
    for i, row in enumerate(plans[0].rows):
        gram = torch.zeros(len(row), len(row), dtype=torch.float64)
        pull = torch.zeros(len(row), dtype=torch.float64)
        for lesson, own in zip(lessons, runs, strict=True):
            products, towards, size = _equations(lesson, own, i, chunk)
            if 0 < size < math.inf:
                part = lesson.share / (size * total)
                gram += products * part
                pull += towards * part
        ridge = max(strength, 1e-12 * float(gram.diagonal().max()))
        change = torch.linalg.solve(gram + ridge * torch.eye(len(row), dtype=torch.float64), pull) if ridge else pull
        if bool(change.isfinite().all()):
            row = tuple(c + d for c, d in zip(row, change.tolist(), strict=True))
            plans = [replace(plan, rows=(*plan.rows[:i], row, *plan.rows[i + 1 :])) for plan in plans]
        for plan, own in zip(plans, runs, strict=True):
            step = updates(plan)[i]
            for run in own:
                run.advance(step)
    return plans, [torch.cat([run.states[-1] for run in own]) for own in runs]


def _equations(lesson: Lesson, runs: Sequence[Rollout], i: int, chunk: int) -> tuple[Tensor, Tensor, float]:
    """Of one model's step i: Gram matrix of the columns, their products with the prior row's residual, its square."""
    prior = lesson.prior
    row, (keep, gain) = prior.rows[i], _gains(prior, i)
    gram = torch.zeros(len(row), len(row), dtype=torch.float64)
    pull, size = torch.zeros(len(row), dtype=torch.float64), 0.0
    for first, run in zip(range(0, len(lesson.noises), chunk), runs, strict=True):
        run.evaluate(prior.sigmas[i])
        columns = torch.stack([run.values[i - j].flatten() for j in range(len(row))]).double() * gain
        rest = (lesson.targets[i][first : first + chunk] - keep * run.states[i]).flatten().double()
        rest = rest - columns.T @ torch.tensor(row, dtype=torch.float64, device=columns.device)
        gram += (columns @ columns.T).cpu()
        pull += (columns @ rest).cpu()
        size += float(rest @ rest)
    return gram, pull, size


def _gains(plan: Plan, i: int) -> tuple[float, float]:
    """(keep, gain) of step i in the plan's own basis, whatever its row."""
    probe = updates(replace(plan, rows=(*plan.rows[:i], (2.0,), *plan.rows[i + 1 :])))[i]
    return probe.keep, probe.weights[0] / 2


def fitted(trial: Trial, prior: Plan, cache: Cache) -> tuple[Plan, float]:
    """The prior's levels, which are some of the cache's, with fitted rows; the error of the fitting noise, tempered."""
    noises = trial.noises["fit"].first(cache.states.shape[1])

    def fit() -> list[Any]:
        lesson = Lesson(denoiser=trial.ledger.meter, prior=prior, noises=noises, targets=cache.at(prior.sigmas[1:]))
        (plan,), (end,) = fit_rows([lesson], RIDGE, trial.chunk)
        return [plan.rows, end_squares(end, noises, trial.metric).tolist()]

    rows, q = trial.ledger.recall(f"rows {RIDGE} {prior.hash}", prior.nfe * len(noises), fit)
    return replace(prior, rows=tuple(map(tuple, rows))), trial.tempered(as_tensor(q))
