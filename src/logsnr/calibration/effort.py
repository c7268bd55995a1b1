"""Effort: how much a search tries before it settles.

    full     a hundred built-in solvers ranked, fitted rows on a dozen sets of levels, the walk, the descents
    quick    the same ranking on half as many noises, fitted rows on half as many sets of levels, a short walk, and no
             more: about 35 rollouts

Rows by least squares on levels of least local error are most of what a calibration gains; docs/calibration.md has what
the rest is worth on the digits.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What a search tries.

    Attributes:
        few: all built-in solvers are ranked on one selection noise of so many.
        leaders: of them, measured on all selection noises and reported.
        lasts: last levels above 0 of the grids to try, in units of sigma_data.
        finalists: of the levels with fitted rows, measured on the selection noise too.
        answers: evaluations of the fitting noises that the search may take, unless told.
        fewest: rollouts that it needs at least.
        strides: of the walk, in log sigma.
        walk: rollouts of a walk, at most.
        deep: whether all numbers descend.
    """

    few: int
    leaders: int
    lasts: tuple[float, ...]
    finalists: int
    answers: int
    fewest: int
    strides: tuple[float, ...]
    walk: int
    deep: bool

    def rollouts(self, nfe: int) -> int:
        """The budget of a plan of so many steps, in rollouts of the fitting noises."""
        return min(max(self.answers // max(nfe, 1), self.fewest), MOST_ROLLOUTS)


MOST_ROLLOUTS = 200
EFFORTS = {
    "full": Effort(
        few=8,
        leaders=6,
        lasts=(0.05, 0.1, 0.2, 0.4),
        finalists=4,
        answers=1400,
        fewest=40,
        strides=(1.6, 0.8, 0.4, 0.2),
        walk=70,
        deep=True,
    ),
    "quick": Effort(
        few=16, leaders=3, lasts=(0.1, 0.2), finalists=2, answers=0, fewest=40, strides=(0.8, 0.4), walk=12, deep=False
    ),
}
