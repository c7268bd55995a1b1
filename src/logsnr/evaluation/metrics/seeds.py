"""Several seeds: the mean of a number over repetitions, and how far it may be off.

    mean +- t_(n-1) s / sqrt n,      s the standard deviation over n repetitions, t the 97.5 % quantile of Student's law

covers the expectation of 95 of 100 means, of two repetitions too, where two standard errors would cover 70.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from logsnr.evaluation.metrics.moments import Estimated


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Repetitions of a number.

    Attributes:
        n: how many.
        mean: of them.
        stderr: of the mean; nan of one.
    """

    n: int
    mean: float
    stderr: float

    @property
    def half(self) -> float:
        """Half of the 95 % interval around the mean; nan of one repetition."""
        return student(self.n - 1) * self.stderr if self.n > 1 else math.nan

    @property
    def decided(self) -> bool:
        """Whether 0 is outside the interval: of differences, whether there is one."""
        return self.n > 1 and abs(self.mean) > self.half

    @property
    def estimated(self) -> Estimated:
        """The mean with its standard error."""
        return Estimated(value=self.mean, stderr=self.stderr)


def summarise(values: Sequence[float]) -> Summary:
    """Mean, standard error and 95 % interval over independent repetitions.

    Raises:
        ValueError: of none.
    """
    if not values:
        raise ValueError("nothing to summarise: give at least one repetition")
    n = len(values)
    stderr = statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return Summary(n=n, mean=statistics.fmean(values), stderr=stderr)


def student(degrees: int, level: float = 0.95) -> float:
    """The t of two-sided intervals: P(|T| < t) = level, of so many degrees of freedom (12.71, 4.30, 3.18, 2.78 ...).

    Raises:
        ValueError: of fewer than one degree, or of a level outside (0, 1).
    """
    if degrees < 1 or not 0 < level < 1:
        raise ValueError(f"degrees = {degrees}, level = {level}: give at least 1, and a level between 0 and 1")
    low, high = 0.0, math.pi / 2  # t = sqrt(degrees) tan(angle)
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _within(angle, degrees) < level else (low, angle)
    return math.sqrt(degrees) * math.tan(low)


def _within(angle: float, degrees: int) -> float:
    """P(|T| < sqrt(degrees) tan(angle)), a finite sum (Abramowitz & Stegun 26.7.3-4)."""
    c, odd = math.cos(angle) ** 2, degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees, 2):
        term *= c * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
