"""Tuned baselines: what stock solvers reach when their levels are chosen for the model too.

tuned_ends    the two ends of a grid, by coordinate search on measured errors
searched      iPNDM on the levels of least summed local error (GITS, 2405.11326): no evaluation
"""

from __future__ import annotations

import math
from collections.abc import Callable

from logsnr.calibration.schedule import best_levels
from logsnr.calibration.teacher import Cache
from logsnr.errors import LogsnrError
from logsnr.sampling import solvers
from logsnr.sampling.plan import Grid, Plan


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
