"""Starts: where to walk and descend from, by rollouts whose rows are fitted as they go (rows.py).

Levels are ranked on the fitting noise, which costs no selection; the first of them, and other bases and histories on
the best, on the selection noise as well.
"""

from __future__ import annotations

from logsnr.calibration.levels import first_levels, tried_levels
from logsnr.calibration.rows import fitted, lengthened, prior_rows
from logsnr.calibration.teacher import Cache
from logsnr.calibration.trial import Trial
from logsnr.sampling.plan import Basis, Grid, Plan

LONGEST = 2
"""Past estimates that "auto" uses on all levels; one less and one more on the best of them."""


def by_error(entry: tuple[Plan, float]) -> float:
    """To sort by."""
    return entry[1]


def starts(trial: Trial, cache: Cache) -> list[Plan]:
    """Best first: fitted rows on many levels, and the best built-in solver that fits the search's space."""
    settings, tries = trial.settings, trial.settings.tries
    n, wanted = settings.nfe, settings.history
    bases: tuple[Basis, ...] = ("eps", "x0", "velocity")
    if settings.basis != "auto":
        bases = (settings.basis,)
    history = min(LONGEST if wanted == "auto" else wanted, n - 1)
    others = {min(LONGEST + 1, n - 1), *((1,) if tries.deep else ())} - {history, n} if wanted == "auto" else set()

    def rows(levels: Grid, history: int, basis: Basis) -> tuple[Plan, float]:
        trial.tell("rows")
        return fitted(trial, prior_rows(levels, history, basis), cache)

    def measured(entries: list[tuple[Plan, float]], how: str) -> list[tuple[Plan, float]]:
        """Plans and their errors on the fitting noise, with those on both noises instead, best first."""
        both = [(plan, trial.both(plan, fit, {"from": how})) for plan, fit in entries]
        return sorted(both, key=by_error)

    unit, past = trial.teacher.sigma_data, min(1, history)
    tried = tried_levels(cache, n, unit, past, tries.lasts, first=settings.first)
    if trial.start is not None and settings.first is None:
        # where to begin on the fitting noise, by one grid from each level; then all grids from the best
        tops = sorted((rows(levels, history, bases[0]) for levels in first_levels(cache, n, unit)), key=by_error)
        for top, _ in tops[:1]:
            tried += tried_levels(cache, n, unit, past, tries.lasts, first=top.sigmas[0])
        tried = list(dict.fromkeys(tried))
    ranked = sorted((rows(levels, history, bases[0]) for levels in tried), key=by_error)
    best, *rest = measured(ranked[: tries.finalists], "rows")
    variants = [rows(best[0].sigmas, history, basis) for basis in bases[1:]]
    variants += [rows(best[0].sigmas, other, bases[0]) for other in sorted(others)]
    best = min([best, *measured(variants, "rows")], key=by_error)
    longest = n if wanted == "auto" else wanted + 1
    fits = (plan for plan in trial.leaders.values() if plan.basis in bases and max(map(len, plan.rows)) <= longest)
    if (plan := next(fits, None)) is not None:
        plan = lengthened(plan, history)
        rest += measured([(plan, trial.tempered(trial.squares(plan, "fit")))], "built-in")
    return [best[0], *(plan for plan, _ in sorted(rest, key=by_error))]
