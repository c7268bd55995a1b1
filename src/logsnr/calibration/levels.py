"""Levels from a cache: those to try, and those of least summed local error by dynamic programming (as GITS,
2405.11326).

A step from node j to node k that combines the estimates at j and at the node i before it has the error

    min_c || y_k - y_j - (sigma_k - sigma_j) (c e_j + (1 - c) e_i) ||  sigma_data/sqrt(sigma_data^2 + sigma_k^2)

weighted by how much of it survives to sigma 0.  With Gram matrices of the cache all of them are arithmetic on M^3
numbers; the path of n steps with the smallest sum costs no evaluation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from logsnr.calibration.teacher import Cache
from logsnr.noise import alpha_s
from logsnr.sampling import grids
from logsnr.sampling.plan import Grid

MIN_STEP = math.log(1.25)
"""Smallest step in log sigma: a shorter one spends an evaluation on nothing."""

SPREADS = (grids.log_linear, grids.karras, grids.flow_range)
"""How the levels of a grid to try are spread."""
FIRSTS = (80.0, 40.0, 20.0, 10.0, 5.0, 2.5)
"""First levels to try where a Gaussian start leads there, in units of sigma_data, beside the largest."""


def tried_levels(
    cache: Cache, n: int, sigma_data: float, history: int, lasts: Sequence[float], *, first: float | None = None
) -> list[Grid]:
    """Levels among the cache's that are worth a rollout, each once: those of least local error, and log-linear, Karras
    and even flow-time grids from the largest to one of `lasts`.

    Args:
        cache: the teacher's trajectories.
        n: number of steps.
        sigma_data: of the data.
        history: as in `best_levels`.
        lasts: last levels above 0 of the grids, in units of `sigma_data`.
        first: the first level of all of them, one of the cache's; None for one in the upper quarter of the range, the
            teacher's for grids.
    """
    low, high = cache.sigmas[-2], cache.sigmas[0] if first is None else first
    found = [best_levels(cache, n, sigma_data, history, first=first)]
    for spread in SPREADS:
        for last in lasts:
            levels = _onto(cache, spread(n, high, min(max(last * sigma_data, low), high / 2)))
            if levels is not None and levels not in found:
                found.append(levels)
    return found


def first_levels(cache: Cache, n: int, sigma_data: float) -> list[Grid]:
    """One grid, even in flow time, from each of the first levels that a start may lead to."""
    high, low = cache.sigmas[0], cache.sigmas[-2]
    tops = [high, *(first * sigma_data for first in FIRSTS if 4 * low < first * sigma_data < high / 1.25)]
    lasts = [min(max(0.2 * sigma_data, low), top / 2) for top in tops]
    found = (_onto(cache, grids.flow_range(n, top, last)) for top, last in zip(tops, lasts, strict=True))
    return [levels for levels in found if levels is not None]


def _onto(cache: Cache, levels: Grid) -> Grid | None:
    """Levels moved to the nearest of the cache's (in log sigma); None where two would meet or nearly so."""
    known = torch.tensor(cache.sigmas[:-1], dtype=torch.float64).log()
    at = [int((known - math.log(s)).abs().argmin()) for s in levels[:-1]]
    if any(known[i] - known[j] < MIN_STEP for i, j in itertools.pairwise(at)):
        return None
    return (*(cache.sigmas[i] for i in at), 0.0)


def best_levels(
    cache: Cache, n: int, sigma_data: float, history: int, slack: float = 0.25, first: float | None = None
) -> Grid:
    """n + 1 levels among the cache's, from the first `slack` of them (in log sigma) to 0.

    Args:
        cache: the teacher's trajectories.
        n: number of steps.
        sigma_data: of the data.
        history: 0 to combine nothing (DDIM), else the best pair of two estimates.
        slack: share of the range in which the run may start.
        first: where it starts, one of the cache's levels; None to choose.
    """
    cost, start = local_errors(cache, sigma_data, history), _start_errors(cache, sigma_data, slack, first)
    m = len(cache.sigmas) - 1
    alone = cost[torch.arange(m), torch.arange(m)]  # without a past: i = j
    best = start[:, None] + alone  # [j, k]: one step taken, from j to k
    back: list[Tensor] = []
    for _ in range(n - 1):
        total = best[:, :m, None] + cost  # [i, j, k]
        value, where = total.min(0)
        best = value
        back.append(where)
    j, k = int(best[:, m].argmin()), m
    path = [k, j]
    for where in reversed(back):
        j, k = int(where[j, k]), j
        path.append(j)
    return tuple(cache.sigmas[node] for node in reversed(path))


def local_errors(cache: Cache, sigma_data: float, history: int) -> Tensor:
    """cost[i, j, k] of the step j -> k with i before j (i = j: no past) `[M, M, M + 1]`, inf where not i <= j < k."""
    m = len(cache.eps)
    e, y = cache.eps.flatten(1).double(), cache.states.flatten(1).double()
    sigma = torch.tensor(cache.sigmas, dtype=torch.float64)
    ee, ey, yy = (e @ e.T).cpu(), (e @ y.T).cpu(), (y @ y.T).cpu()
    # residual of DDIM r = y_k - y_j - h e_j, and the difference f = h (e_i - e_j) that history adds a multiple of
    h = sigma[None, :] - sigma[:m, None]  # [j, k]
    diag, self_y = ee.diagonal(), ey[torch.arange(m), torch.arange(m)]
    rr = yy.diagonal()[None, :] + yy.diagonal()[:m, None] - 2 * yy[:m, :]
    rr = rr + h.square() * diag[:, None] - 2 * h * (ey - self_y[:, None])
    out = rr[None].expand(m, m, m + 1).clone()
    if history:
        er = ey[:, None, :] - ey[:, :m, None] - h[None] * ee[:, :, None]  # <e_i, r_jk>
        own = ey - self_y[:, None] - h * diag[:, None]  # <e_j, r_jk>
        apart = diag[:, None] + diag[None, :] - 2 * ee
        gain = (er - own[None]).square() / apart.clamp(min=1e-12 * float(diag.max()))[:, :, None]
        past = (torch.arange(m)[:, None] < torch.arange(m))[:, :, None]
        out = torch.where(past, out - gain, out)
    out = out.clamp(min=0).sqrt() * (sigma_data / torch.hypot(torch.tensor(sigma_data), sigma))
    logs = sigma.log()
    i, j, k = torch.arange(m)[:, None, None], torch.arange(m)[None, :, None], torch.arange(m + 1)[None, None, :]
    short = (logs[:m, None] - logs[None, :] < MIN_STEP)[None] | (
        ((logs[:m, None] - logs[None, :m]) < MIN_STEP)[:, :, None] & (i < j)
    )
    return out.masked_fill((i > j) | (j >= k) | short, math.inf) / math.sqrt(e[0].numel())


def _start_errors(cache: Cache, sigma_data: float, slack: float, first: float | None) -> Tensor:
    """Error of starting at node j where a plan would, with the noise itself unless told, in place of the teacher's
    state."""
    logs = torch.tensor(cache.sigmas[:-1], dtype=torch.float64).log()
    error = torch.full_like(logs, math.inf)
    upper = (logs >= logs[0] - slack * (logs[0] - logs[-1])).nonzero()[:, 0].tolist()
    for i in upper if first is None else [cache.sigmas.index(first)]:
        sigma = cache.sigmas[i]
        apart = cache.noises.at(sigma).double() / alpha_s(sigma)[0] - cache.states[i].double()
        error[i] = float(apart.square().mean().sqrt()) * sigma_data / math.hypot(sigma_data, sigma)
    return error
