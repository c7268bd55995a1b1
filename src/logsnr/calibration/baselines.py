"""Baselines: what a calibrated plan has to beat, stock solvers, also with levels chosen for the model.

alternatives  what nobody calibrates for: automatic plans, and all compared solvers on all compared grids
tuned_ends    the two ends of a grid, by coordinate search on measured errors
searched      iPNDM on the levels of least summed local error (GITS, 2405.11326): no evaluation
aligned       DPM-Solver++(2M) on the levels of least KL bound (Align Your Steps, 2404.14507): no evaluation

The KL bound of Align Your Steps holds the denoiser's answer fixed over each step of a stochastic sampler,

    sum_i  int from sigma_{i+1} to sigma_i of  E || x0(y, sigma) - x0(y_i, sigma_i) ||^2 / sigma^3  d sigma.

Here y runs along the teacher's deterministic trajectories that the cache holds (the paper draws pairs from the forward
process), the integral is the trapezoidal rule in 1/sigma^2 on the cache's levels, and all partitions with the cache's
two ends are compared at once by dynamic programming (the paper descends from one).

`calibrate(..., method="ends" | "gits" | "ays")` runs them on a calibration's own noises.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from logsnr.calibration.levels import best_levels
from logsnr.calibration.teacher import Cache
from logsnr.calibration.trial import Trial
from logsnr.denoiser import Denoiser
from logsnr.errors import LogsnrError
from logsnr.sampling import solvers
from logsnr.sampling.default import auto_plan
from logsnr.sampling.names import compared_grids, compared_solvers, find_grid, find_solver
from logsnr.sampling.plan import Grid, Plan
from logsnr.sampling.table import table_of


def alternatives(denoiser: Denoiser, n: int, low: float, high: float) -> dict[str, Plan]:
    """What a model is sampled with unasked ("automatic"), and every solver that is compared on every grid from `high`
    to `low`, named "solver, grid"; plans that coincide appear once."""
    about: dict[str, Any] = {"sigma_data": denoiser.sigma_data, "finite_at_inf": denoiser.finite_at_inf}
    found = {"automatic": auto_plan(n, low, high, **about, dim=denoiser.dim)}
    table = table_of(denoiser, (low, high))
    for grid in compared_grids("range", *(("table",) if n <= len(table) else ())):
        levels = find_grid(grid)[1](n, high, low, table=table)
        for solver in compared_solvers("rows"):
            plan = find_solver(solver)[1](levels)
            if all(plan != other for other in found.values()):
                found[f"{solver}, {grid}"] = plan
    return found


def ends(trial: Trial, cache: Cache) -> None:
    """The leading built-in solvers with tuned ends; untuned they stand beside."""
    for name in trial.leaders:
        solver, _, grid = name.partition(", ")
        if grid in compared_grids("range"):
            error = partial(trial.offer, how={"from": "ends", "name": f"{name}, tuned ends"})
            low, high = trial.settings.sigma_range
            tuned_ends(find_solver(solver)[1], find_grid(grid)[1], trial.settings.nfe, low, high, error)


def gits(trial: Trial, cache: Cache) -> None:
    """iPNDM on searched levels, better than the built-in solvers or not."""
    trial.best = None
    plan = searched(cache, trial.settings.nfe, trial.teacher.sigma_data)
    trial.offer(plan, {"from": "gits", "name": "iPNDM-4, GITS"})


def ays(trial: Trial, cache: Cache) -> None:
    """DPM-Solver++(2M) on aligned levels, better than the built-in solvers or not."""
    trial.best = None
    trial.offer(aligned(cache, trial.settings.nfe), {"from": "ays", "name": "DPM++(2M), AYS"})


def tuned_ends(
    solver: Callable[[Grid], Plan],
    levels: Callable[[int, float, float], Grid],
    n: int,
    low: float,
    high: float,
    error: Callable[[Plan], float],
    points: int = 6,
) -> tuple[float, Plan]:
    """The solver on the ends, within [low, high], of least error.

    The last level above 0 is sought first, then the first level, each among `points` levels, geometric over the lower
    half and the upper half of the range (in log sigma), then the last once more.

    Args:
        solver: grid -> plan.
        levels: (n, sigma_max, sigma_min) -> grid.
        n: number of steps.
        low: smallest level allowed.
        high: largest level allowed.
        error: of a plan, e.g. measured on selection noise.
        points: candidates per end, at least 2.

    Returns:
        The error and the plan.
    """
    if points < 2:
        raise LogsnrError(f"points = {points}: must be at least 2, the ends of each half of the range")
    half = math.log(high / low) / 2
    lasts = [low * math.exp(half * i / points) for i in range(points)]
    firsts = [high * math.exp(-half * i / points) for i in range(points)]
    known: dict[tuple[float, float], tuple[float, Plan]] = {}

    def measured(first: float, last: float) -> float:
        if (first, last) not in known:
            plan = solver(levels(n, first, last))
            known[first, last] = error(plan), plan
        return known[first, last][0]

    last = min(lasts, key=lambda v: measured(high, v))
    first = min(firsts, key=lambda v: measured(v, last))
    last = min(lasts, key=lambda v: measured(first, v))
    return known[first, last]


def searched(cache: Cache, n: int, sigma_data: float, order: int = 4) -> Plan:
    """iPNDM on searched levels, which start where the teacher does."""
    return solvers.ipndm(best_levels(cache, n, sigma_data, 0, slack=0.0), order)


def aligned(cache: Cache, n: int, solver: Callable[[Grid], Plan] = solvers.dpmpp) -> Plan:
    """A solver on the levels of least KL bound, the last of them put to 0 as the published lists are used."""
    return solver((*aligned_levels(cache, n)[:-1], 0.0))


def aligned_levels(cache: Cache, n: int) -> Grid:
    """The n + 1 levels, from the cache's largest to its smallest, of least KL bound.

    Raises:
        LogsnrError: if the cache has too few levels.
    """
    levels = len(cache.sigmas) - 1
    if not 1 <= n < levels:
        raise LogsnrError(f"n = {n}: must be in [1, {levels - 1}], the cache has {levels} levels above 0")
    cost = step_divergences(cache)
    best, back = cost[0], []
    for _ in range(n - 1):
        best, where = (best[:, None] + cost).min(0)
        back.append(where)
    path = [levels - 1]
    for where in reversed(back):
        path.append(int(where[path[-1]]))
    return tuple(cache.sigmas[node] for node in (0, *reversed(path)))


def step_divergences(cache: Cache) -> Tensor:
    """The bound's part of a step from level j to level k, `[M, M]` per sample, inf where not j < k."""
    m = len(cache.eps)
    sigma = torch.tensor(cache.sigmas[:m], dtype=torch.float64)
    y, e = cache.states[:m].flatten(1).double().cpu(), cache.eps.flatten(1).double().cpu()
    x0 = y - sigma[:, None] * e
    x0 = x0 - x0[-1]  # differences are all that counts: keep their digits
    gram = x0 @ x0.T
    apart = (gram.diagonal()[:, None] + gram.diagonal() - 2 * gram).clamp(min=0) / cache.eps.shape[1]
    weight = (sigma[1:] ** -2 - sigma[:-1] ** -2) / 2  # of d sigma / sigma^3
    parts = (apart[:, 1:] + apart[:, :-1]) / 2 * weight
    parts = parts.masked_fill(torch.arange(m)[:, None] > torch.arange(m - 1), 0.0)
    out = torch.cat([parts.new_zeros(m, 1), parts.cumsum(1)], 1)
    return out.masked_fill(torch.arange(m)[:, None] >= torch.arange(m), math.inf)
