"""Universal plans: one plan for every model, fitted over several.

In units of sigma_data every model's data has variance 1, and eps and x0 rows do not change with the unit: a plan of
relative levels sigma/sigma_data is a plan for all of them, but for its first level, which each model has its own of
(sampling/universal.py).  What models do not share is where in between they turn noise into what: levels and rows that
were free to suit six models to the end suited the seventh badly.  So the levels have two numbers only, the second and
the last, between which they are even in an angle,

    u_i = 3 tan^2 theta_i,     theta_1 ... theta_{n-1} even,

half way between even log-levels and even times of a flow (u = 3 tan^2 theta is t = sin^2 theta of a flow with its
middle at 3).  The rows are those of least squares along every model's own rollout, each step for itself (rows.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from logsnr.calibration.rollout import TAIL, Noises, end_squares, tempered
from logsnr.calibration.rows import RIDGE, Lesson, fit_rows, prior_rows
from logsnr.calibration.teacher import Cache, remember
from logsnr.denoiser import Denoiser
from logsnr.errors import LogsnrError
from logsnr.noise import alpha_s
from logsnr.sampling.default import CENTRE, first_level
from logsnr.sampling.plan import Plan
from logsnr.sampling.teacher import teacher_on
from logsnr.sampling.universal import scaled

WIDTH = 0.05
"""Of the lattice of relative levels, in log sigma."""
LOWEST = 0.03
"""Smallest relative level: that of Stable Diffusion's tables, and of data of 8 bits about where nothing is left."""
HISTORY = 3
"""Past estimates that a row may use."""


def nodes(high: float) -> tuple[float, ...]:
    """The lattice of relative levels below a largest level, falling from high/1.25 to `LOWEST`."""
    count = int(math.log(high / 1.25 / LOWEST) / WIDTH) + 1
    return tuple(high / 1.25 * math.exp(-WIDTH * i) for i in range(count))


def spaced(first: int, last: int, count: int, lattice: Sequence[float]) -> list[float] | None:
    """At least two levels of a lattice, about even in theta, between two of them; None where it is too coarse for so
    many."""
    angle = [math.atan(math.sqrt(u / CENTRE)) for u in lattice]
    gap = (angle[last] - angle[first]) / (count - 1)
    wanted = [angle[first] + gap * i for i in range(count)]
    chosen = [min(range(first, last + 1), key=lambda k: abs(angle[k] - theta)) for theta in wanted]
    return [lattice[k] for k in chosen] if len(set(chosen)) == count else None


@dataclass(frozen=True, kw_only=True)
class Member:
    """A model with the noises it is judged by.

    Attributes:
        denoiser: the model.
        noises: with the teacher's ends.
        cache: the teacher's trajectories, at the levels of the lattice that the model has.
        share: in the least squares of the rows.
        weight: in the choice of the levels.
    """

    denoiser: Denoiser
    noises: Noises
    cache: Cache
    share: float = 1.0
    weight: float = 1.0

    def own(self, relative: Plan) -> Plan:
        """A plan of relative levels in the model's units, those between its ends on the nearest levels remembered."""
        (low, high), model = self.denoiser.sampling_range, self.denoiser
        first = first_level(relative.nfe, low, high, sigma_data=model.sigma_data, finite_at_inf=model.finite_at_inf)
        plan, at = scaled(relative, model.sigma_data, low, first), -1
        levels = []
        for sigma in plan.sigmas[1:-1]:
            at = max(at + 1, _index(self.cache.sigmas, sigma))
            levels.append(self.cache.sigmas[at])
        return replace(plan, sigmas=(first, *levels, 0.0))

    def lesson(self, relative: Plan) -> Lesson:
        """The teacher's states at the plan's levels."""
        plan = self.own(relative)
        states = [self.cache.states[self.cache.sigmas.index(v)] * alpha_s(v)[0] for v in plan.sigmas[1:-1]]
        return Lesson(
            denoiser=self.denoiser, prior=plan, noises=self.noises, targets=[*states, self.noises.end], share=self.share
        )


@torch.no_grad()
def member(
    denoiser: Denoiser,
    noise: Tensor,
    lattice: Sequence[float],
    *,
    cond: Mapping[str, Any] | None = None,
    share: float = 1.0,
    weight: float = 1.0,
    chunk: int = 512,
) -> Member:
    """A model with the trajectories of some noises, of one evaluation per level of the lattice and some beyond.

    Args:
        denoiser: the model; of the lattice in its units, the levels within its sampling range are remembered.
        noise: `[N, *shape]`.
        lattice: relative levels (`nodes`).
        cond: conditions by keyword, one entry per noise.
        share: in the least squares of the rows.
        weight: in the choice of the levels.
        chunk: samples per call.

    Raises:
        LogsnrError: if the model has too few of the lattice's levels.
    """
    (low, high), unit = denoiser.sampling_range, denoiser.sigma_data
    levels = [unit * u for u in lattice if low <= unit * u <= high / 1.2]
    if len(levels) < len(lattice) / 2:
        raise LogsnrError(
            f"relative levels {lattice[-1]:.4g} to {lattice[0]:.4g} at sigma_data {unit:.4g}: most of them leave the "
            f"model's range ({low:.4g}, {high:.4g}); fit with a model that covers them, or wrap it"
        )
    grid = (*_between(high, levels[0])[:-1], *levels, *_between(levels[-1], low)[1:], 0.0)
    noises, cache = remember(denoiser, teacher_on(grid), noise, cond, chunk=chunk)
    first = grid.index(levels[0])
    kept = slice(first, first + len(levels))
    cache = replace(cache, sigmas=cache.sigmas[kept], states=cache.states[kept], eps=cache.eps[:0])
    noises = noises.first(cache.states.shape[1])
    return Member(denoiser=denoiser, noises=noises, cache=cache, share=share, weight=weight)


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A universal plan.

    Attributes:
        plan: levels relative to sigma_data; the first stands for each model's largest.
        errors: of each model, the RMSE, outliers tempered as in a calibration.
        error: their weighted geometric mean.
        tried: these errors for every pair of a second and a last level that was tried.
    """

    plan: Plan
    errors: list[float]
    error: float
    tried: dict[tuple[float, float], list[float]]


@torch.no_grad()
def fit_universal(
    members: Sequence[Member], n: int, *, high: float, start: tuple[float, float] | None = None, chunk: int = 512
) -> Fitted:
    """The plan of n evaluations with the least geometric mean of errors over all members.

    Rows and levels are judged by the same noises: a few numbers per step, fitted to the states of several models.

    Args:
        members: the models, all with the lattice `nodes(high)`.
        n: number of evaluations, at least 3.
        high: relative level that stands for each model's largest.
        start: the second and the last relative level to begin the search at; None for the usual.
        chunk: samples per call.

    Raises:
        LogsnrError: if there is no member, or no plan of so many levels on the lattice.
    """
    if not members:
        raise LogsnrError("no models to fit a plan over: give at least one")
    lattice = nodes(high)
    if isinstance(n, bool) or not isinstance(n, int) or not 3 <= n <= len(lattice) // 4:
        raise LogsnrError(f"n = {n}: this lattice has room for 3 to {len(lattice) // 4} evaluations")
    scales: list[float] = []  # of tempering, one per model: that of the first plan tried
    known: dict[tuple[int, int], tuple[Plan, list[float]] | None] = {}

    def error_at(place: tuple[int, int]) -> float:
        """Of the plan between two levels of the lattice, its rows fitted."""
        if place not in known:
            first, last = place
            levels = spaced(first, last, n - 1, lattice) if 0 <= first < last < len(lattice) else None
            known[place] = None if levels is None else fit_between(members, (high, *levels, 0.0), scales, chunk=chunk)
        found = known[place]
        return math.inf if found is None else weighted(members, found[1])

    begin = start or (min(16.0, high / 2), max(8 / n**1.75, 2 * LOWEST))
    best = _index(lattice, begin[0]), _index(lattice, begin[1])
    for step in (8, 4):  # a factor of 1.5, then of 1.2
        moved = True
        while moved:
            moves = ((step, 0), (-step, 0), (0, step), (0, -step))
            better = min(((best[0] + i, best[1] + j) for i, j in moves), key=error_at)
            moved = error_at(better) < error_at(best)
            best = better if moved else best
    found = known[best]
    if found is None:
        raise LogsnrError(f"n = {n}: no levels between {begin[0]:.4g} and {begin[1]:.4g} on this lattice; give start=")
    tried = {(lattice[i], lattice[j]): one[1] for (i, j), one in known.items() if one is not None}
    return Fitted(plan=found[0], errors=found[1], error=weighted(members, found[1]), tried=tried)


def fit_between(
    members: Sequence[Member], levels: Sequence[float], scales: list[float], *, chunk: int = 512
) -> tuple[Plan, list[float]]:
    """The plan of some relative levels with the rows of least squares, and every member's error, tempered.

    Args:
        members: the models.
        levels: the plan's, the last of them 0.
        scales: of the tempering, one for each member; where it is empty, it is filled by this plan's.
        chunk: samples per call.
    """
    prior = prior_rows(tuple(levels), min(HISTORY, len(levels) - 2), "eps")
    plans, ends = fit_rows([one.lesson(prior) for one in members], RIDGE, chunk)
    squares = [end_squares(end, one.noises, None) for end, one in zip(ends, members, strict=True)]
    scales.extend(TAIL * float(q.mean()) for q in squares[len(scales) :])
    errors = [math.sqrt(max(tempered(q, scale), 1e-300)) for q, scale in zip(squares, scales, strict=True)]
    return replace(prior, rows=plans[0].rows), errors


def weighted(members: Sequence[Member], errors: Sequence[float]) -> float:
    """The geometric mean, by the members' weights."""
    total = sum(one.weight for one in members)
    return math.exp(sum(one.weight * math.log(e) for one, e in zip(members, errors, strict=True)) / total)


def _between(high: float, low: float) -> tuple[float, ...]:
    """Levels from one to another, both included, about .1 apart in log sigma; one where the two are the same."""
    steps = math.ceil(math.log(high / low) / (2 * WIDTH) - 1e-9)
    return (*(high * (low / high) ** (i / steps) for i in range(steps)), low)


def _index(lattice: Sequence[float], level: float) -> int:
    """Of the lattice's level nearest to one."""
    return min(range(len(lattice)), key=lambda i: abs(math.log(lattice[i] / level)))
