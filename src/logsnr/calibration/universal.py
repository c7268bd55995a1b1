"""Universal plans: one plan for every model, fitted over several.

In units of sigma_data every model's data has variance 1, and eps and x0 rows do not change with the unit: a plan of
relative levels sigma/sigma_data is a plan for all of them, but for its first level, which is each model's own largest
(sampling/universal.py).  What models do not share is where in between they turn noise into what: levels and rows that
were free to suit six models to the end suited the seventh badly.  So the levels have two numbers only,

    sigma_0 = the model's largest,     sigma_i = sigma_data u_1 q^(i-1)   for i = 1 ... n - 1,

and the rows are those of least squares along every model's own rollout, each step for itself, all models weighing the
same (rows.py).  u_1 and q minimise the geometric mean over models of the mean squared end-point error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from logsnr.calibration.levels import MIN_STEP
from logsnr.calibration.rollout import TAIL, Noises, squares, tempered
from logsnr.calibration.rows import RIDGE, Lesson, fit_rows, prior_rows
from logsnr.calibration.teacher import Cache, remember, taught
from logsnr.denoiser import Denoiser
from logsnr.errors import LogsnrError
from logsnr.noise import alpha_s
from logsnr.sampling.batches import chunks, in_turn
from logsnr.sampling.plan import Plan
from logsnr.sampling.start import start
from logsnr.sampling.teacher import teacher_on
from logsnr.sampling.universal import scaled, universal_plan

__all__ = ["Fitted", "Member", "fit_universal", "member", "nodes", "universal_plan"]

WIDTH = 0.025
"""Of the lattice of relative levels, in log sigma."""
LOWEST = 0.03
"""Smallest relative level: that of Stable Diffusion's tables, and of data of 8 bits about where nothing is left."""


def nodes(high: float) -> tuple[float, ...]:
    """The lattice of relative levels below a largest level, falling from high/1.25 to `LOWEST`."""
    count = int(math.log(high / 1.25 / LOWEST) / WIDTH) + 1
    return tuple(high / 1.25 * math.exp(-WIDTH * i) for i in range(count))


@dataclass(frozen=True, kw_only=True)
class Member:
    """A model with the noises it is judged by.

    Attributes:
        denoiser: the model.
        fit: noises with the teacher's ends, to fit rows to.
        select: as many others, to choose levels by.
        cache: the teacher's trajectories of `fit`, at the model's levels of the lattice.
        lattice: the relative levels.
        first: of these levels, its index in the cache.
    """

    denoiser: Denoiser
    fit: Noises
    select: Noises
    cache: Cache
    lattice: tuple[float, ...]
    first: int

    def own(self, relative: Plan) -> Plan:
        """A plan of relative levels in the model's units."""
        return scaled(relative, self.denoiser.sigma_data, *self.denoiser.sampling_range)

    def squares(self, relative: Plan, noises: Noises, chunk: int = 512) -> torch.Tensor:
        """Mean squared end-point error of every sample under a plan of relative levels."""
        return squares(self.denoiser, self.own(relative), noises, chunk, None)

    def lesson(self, relative: Plan) -> Lesson:
        """The teacher's states at the plan's levels, which are some of the lattice's."""
        plan = self.own(relative)
        at = [self.first + self.lattice.index(u) for u in relative.sigmas[1:-1]] + [-1]
        targets = [self.cache.states[i] * alpha_s(self.cache.sigmas[i])[0] for i in at]
        return Lesson(denoiser=self.denoiser, prior=plan, noises=self.fit.first(targets[0].shape[0]), targets=targets)


@torch.no_grad()
def member(
    denoiser: Denoiser,
    lattice: Sequence[float],
    *,
    cond: Mapping[str, Any] | None = None,
    n: int = 64,
    seed: int = 0,
    chunk: int = 512,
) -> Member:
    """A model with 2n noises and their trajectories, of one evaluation per level of the lattice and some beyond.

    Args:
        denoiser: the model; the lattice in its units must lie within its sampling range.
        lattice: relative levels (`nodes`).
        cond: conditions by keyword; rows of tensors are used in turn.
        n: noises to fit to, and as many to select by.
        seed: of the noises.
        chunk: samples per call.

    Raises:
        LogsnrError: if the lattice leaves the model's range.
    """
    (low, high), unit = denoiser.sampling_range, denoiser.sigma_data
    levels = [unit * u for u in lattice]
    if not low <= levels[-1] or not levels[0] < high:
        raise LogsnrError(
            f"relative levels {lattice[-1]:.4g} to {lattice[0]:.4g} at sigma_data {unit:.4g} leave the model's range "
            f"({low:.4g}, {high:.4g}): fit with a model that covers them, or wrap it"
        )
    grid = (*_between(high, levels[0])[:-1], *levels, *_between(levels[-1], low)[1:], 0.0)
    noise = start(denoiser, None, 2 * n, torch.Generator().manual_seed(seed))
    plan, given = teacher_on(grid), in_turn(cond, torch.arange(2 * n))
    (first, for_fit), (second, for_select) = ((noise[part], own) for part, own in chunks(2 * n, n, given))
    fit, cache = remember(denoiser, plan, first, for_fit, chunk=chunk)
    select = taught(denoiser, plan, second, for_select, chunk=chunk)
    return Member(
        denoiser=denoiser, fit=fit, select=select, cache=cache, lattice=tuple(lattice), first=grid.index(levels[0])
    )


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A universal plan.

    Attributes:
        plan: levels relative to sigma_data; the first stands for each model's largest.
        error: geometric mean over the models of the RMSE on selection noise, outliers tempered as in a calibration.
    """

    plan: Plan
    error: float


@torch.no_grad()
def fit_universal(members: Sequence[Member], n: int, *, high: float, history: int = 2) -> Fitted:
    """The plan of n evaluations with the least geometric mean of errors over all members.

    Args:
        members: the models, all on one lattice.
        n: number of evaluations, at least 2.
        high: relative level that stands for each model's largest.
        history: past estimates that a row may use.

    Raises:
        LogsnrError: if there is no member, or no plan of so many levels on the lattice.
    """
    if not members:
        raise LogsnrError("no models to fit a plan over: give at least one")
    lattice, inner = members[0].lattice, n - 1
    closest = math.ceil(MIN_STEP / WIDTH - 1e-9)
    if inner < 1 or closest * (inner - 1) >= len(lattice):
        raise LogsnrError(f"n = {n}: this lattice has room for 2 to {(len(lattice) - 1) // closest + 2} evaluations")
    scales: list[float] = []  # of tempering, one per model: that of the first plan tried
    known: dict[tuple[int, int], Fitted] = {}

    def at(first: int, stride: int) -> Fitted:
        """The plan of levels first, first + stride, ... of the lattice, its rows fitted."""
        if (first, stride) not in known:
            chosen = [lattice[first + stride * i] for i in range(inner)]
            prior = prior_rows((high, *chosen, 0.0), min(history, n - 1), "eps")
            rows = fit_rows([m.lesson(prior) for m in members], RIDGE, 512)[0][0].rows
            plan = replace(prior, rows=rows)
            errors = [m.squares(plan, m.select) for m in members]
            scales.extend(TAIL * float(q.mean()) for q in errors[len(scales) :])
            values = [max(tempered(q, scale), 1e-300) for q, scale in zip(errors, scales, strict=True)]
            error = math.exp(sum(map(math.log, values)) / (2 * len(values)))
            known[first, stride] = Fitted(plan=plan, error=error)
        return known[first, stride]

    def allowed(first: int, stride: int) -> bool:
        return first >= 0 and stride >= closest and first + stride * (inner - 1) < len(lattice)

    gaps = max(inner - 1, 1)
    starts = [
        (first, max(round((last - first) / gaps), closest))
        for first in _indices(lattice, 24.0, 12.0, 6.0)
        for last in _indices(lattice, 0.35, 0.15)
    ]
    starts = [s for s in dict.fromkeys(starts) if allowed(*s)] or [(0, closest)]
    best = min(starts, key=lambda s: at(*s).error)
    for step in (24, 12, 6, 3):
        moved = True
        while moved:
            turn = max(round(step / gaps), 1)  # of the stride, so that the last level moves by about a step
            moves = ((step, 0), (-step, 0), (0, turn), (0, -turn), (step, -turn), (-step, turn))
            tried = [s for a, b in moves if allowed(*(s := (best[0] + a, best[1] + b)))]
            better = min(tried, key=lambda s: at(*s).error, default=best)
            moved = at(*better).error < at(*best).error
            best = better if moved else best
    return at(*best)


def _between(high: float, low: float) -> tuple[float, ...]:
    """Levels from one to another, both included, about .1 apart in log sigma; one where the two are the same."""
    steps = math.ceil(math.log(high / low) / (4 * WIDTH) - 1e-9)
    return (*(high * (low / high) ** (i / steps) for i in range(steps)), low)


def _indices(lattice: Sequence[float], *levels: float) -> list[int]:
    """Of the lattice's levels nearest to some."""
    return [min(range(len(lattice)), key=lambda i: abs(math.log(lattice[i] / level))) for level in levels]
