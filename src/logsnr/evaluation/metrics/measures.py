"""Metrics by name, of samples that stream by: what is kept of them, and what each metric makes of it.

Every sample has a rank in a random order of its own (seed 0), so that quarters, parts and the rows that are kept say
nothing about the order in which samples come, class by class or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from logsnr.errors import LogsnrError, unknown
from logsnr.evaluation.metrics.classes import SPLITS, Scores
from logsnr.evaluation.metrics.kernel import kernel_estimate, kernel_within
from logsnr.evaluation.metrics.moments import Estimated, Influenced, Moments, Normal
from logsnr.evaluation.metrics.neighbours import NAMES, neighbourhoods

KEPT = 10_000
"""Rows of features that are kept, at most: for KID, neighbours, and the error of FD."""


class Gathered:
    """What is kept of n samples in features: moments of four quarters, some rows, scores where they are classified.

    Args:
        n: how many there will be.
        keep: rows of features to keep, at most.
        strata: int64 `[n]`, the class that each was dealt, where classes are dealt in equal numbers: quarters have them
            so too, and the error of FD is of draws within classes.
    """

    def __init__(self, n: int, keep: int = KEPT, strata: Tensor | None = None) -> None:
        self.n, self.seen = n, 0
        self.rank = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        self.quarter = self.rank * 4 // n
        self.strata: Tensor | None = None
        if strata is not None:
            order = torch.argsort(strata * n + self.rank)
            self.quarter[order] = torch.arange(n) % 4
            self.strata = strata[torch.argsort(self.rank)][:keep]  # of the rows that are kept
        self.kept = torch.empty(0, 0)
        self._keep = min(keep, n)
        self._quarters: list[Moments] = []
        self.scores: Scores | None = None

    def add(self, features: Tensor, probabilities: Tensor | None = None) -> None:
        """Take in the next samples' features `[B, F]` and, where they are classified, probabilities `[B, C]`.

        Raises:
            LogsnrError: if a feature is NaN or infinite.
            ValueError: if there are more samples than were said.
        """
        rows = slice(self.seen, self.seen + len(features))
        rank = self.rank[rows]
        if len(rank) < len(features):
            raise ValueError(f"more than the {self.n} samples that were announced")
        if not bool(features.isfinite().all()):
            raise LogsnrError(
                f"features of the samples from number {self.seen} on are NaN or infinite: look at the images"
            )
        features = features.cpu()
        if not self._quarters:
            width = features.shape[1]
            self._quarters, self.kept = [Moments(width) for _ in range(4)], torch.zeros(self._keep, width)
        for i, quarter in enumerate(self._quarters):
            quarter.add(features[self.quarter[rows] == i])
        kept = rank < self._keep
        self.kept[rank[kept]] = features[kept].float()
        if probabilities is not None:
            self.scores = self.scores or Scores()
            self.scores.add(probabilities, rank * SPLITS // self.n)
        self.seen += len(features)

    @property
    def quarters(self) -> list[Moments]:
        """Moments of four random quarters.

        Raises:
            LogsnrError: if fewer samples were taken in than said, or fewer than 8.
        """
        return self._whole(8)

    @property
    def moments(self) -> Moments:
        """Moments of all; errors as of `quarters`, but 2 are enough."""
        a, b, c, d = self._whole(2)
        return a + b + c + d

    def _whole(self, least: int) -> list[Moments]:
        if self.seen < self.n or self.n < least:
            raise LogsnrError(f"{self.seen} of {self.n} samples: a metric needs all of them, and at least {least}")
        return self._quarters


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What samples are measured against: features of data, whose roots and pairs are taken once.

    Attributes:
        mean: `[F]`.
        covariance: `[F, F]`, unbiased.
        rows: features of some of the data `[M, F]`, for KID and neighbours; None for none.
        n: how many images are behind it; None where nobody knows.
    """

    mean: Tensor
    covariance: Tensor
    rows: Tensor | None = None
    n: int | None = None

    @classmethod
    def of(cls, features: Tensor | Gathered) -> Reference:
        """Of features `[M, F]` in memory, at least 2, or of what was gathered of them as they streamed by.

        Raises:
            ValueError: if they are fewer, or no matrix.
        """
        if isinstance(features, Gathered):
            gathered = features
        elif features.ndim != 2 or len(features) < 2:
            raise ValueError(f"features of shape {tuple(features.shape)}: give a matrix of at least 2 rows")
        else:
            gathered = Gathered(len(features))
            gathered.add(features)
        moments = gathered.moments
        return cls(mean=moments.mean, covariance=moments.covariance, rows=gathered.kept, n=moments.n)

    @cached_property
    def normal(self) -> Normal:
        """The reference of FD."""
        return Normal(self.mean, self.covariance)

    @cached_property
    def within(self) -> float:
        """What KID has of the reference alone."""
        return kernel_within(self._rows)

    def kernel(self, rows: Tensor) -> Estimated:
        """KID of features `[N, F]`.

        Raises:
            LogsnrError: without rows.
            ValueError: as `kernel_estimate`.
        """
        return kernel_estimate(rows, self._rows, self.within)

    def neighbours(self, rows: Tensor) -> dict[str, Estimated]:
        """Precision, recall, density and coverage of features `[N, F]`; errors as of `kernel`."""
        return neighbourhoods(rows, self._rows)

    @property
    def _rows(self) -> Tensor:
        if self.rows is None:
            raise LogsnrError("these statistics hold moments and no features: make statistics of the images themselves "
                              "with logsnr stats, or leave KID and neighbours out")  # fmt: skip
        return self.rows


class Measuring:
    """Samples against a reference; what several metrics need is computed once."""

    def __init__(self, samples: Gathered, reference: Reference) -> None:
        self.samples, self.reference = samples, reference

    @cached_property
    def influenced(self) -> Influenced:
        """FD of all samples, and what each that is kept moves it by."""
        return self.reference.normal.influenced(self.samples.moments, self.samples.kept, self.samples.strata)

    @property
    def frechet(self) -> Estimated:
        """FD of all samples."""
        return self.influenced.estimated

    @cached_property
    def neighbours(self) -> dict[str, Estimated]:
        """Precision, recall, density and coverage."""
        return self.reference.neighbours(self.samples.kept)

    def kernel(self) -> Estimated:
        """KID of the rows that were kept."""
        return self.reference.kernel(self.samples.kept)

    def limit(self) -> Estimated:
        """FD of infinitely many samples."""
        return self.reference.normal.extrapolated(self.samples.quarters, self.frechet)

    def score(self) -> Estimated:
        """The Inception score."""
        if self.samples.scores is None:
            raise LogsnrError("these features come from no classifier: leave the Inception score (is) out")
        return self.samples.scores.score


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number of samples against a reference.

    Attributes:
        told: what tables call it; FD is FID in Inception's features.
        of: how it is measured.
        classes: whether it needs class probabilities.
        rows: whether it needs features of the reference.
        digits: after the point, of a table.
    """

    told: str
    of: Callable[[Measuring], Estimated]
    classes: bool = False
    rows: bool = False
    digits: int = 4


def _neighbour(name: str) -> Metric:
    return Metric(told=name, of=lambda measuring: measuring.neighbours[name], rows=True)


METRICS: dict[str, Metric] = {
    "fd": Metric(told="FD", of=lambda measuring: measuring.frechet),
    "fd-inf": Metric(told="FD of infinitely many samples", of=Measuring.limit),
    "kid": Metric(told="KID", of=Measuring.kernel, rows=True, digits=6),
    "is": Metric(told="Inception score", of=Measuring.score, classes=True),
    **{name: _neighbour(name) for name in NAMES},
}
"""Metrics by name."""


def wanted(names: Iterable[str], *, rows: bool, classes: bool) -> tuple[str, ...]:
    """The metrics asked for; without a wish, all that the reference and the features allow.

    Raises:
        LogsnrError: if a name is none.
    """
    names = tuple(names)
    for name in names:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
    if names:
        return names
    return tuple(name for name, m in METRICS.items() if (rows or not m.rows) and (classes or not m.classes))


def measured(measuring: Measuring, names: Iterable[str], *, asked: bool) -> dict[str, Estimated]:
    """The metrics by name; of those nobody asked for, the ones that so many samples allow.

    Raises:
        LogsnrError: if one that was asked for cannot be had.
    """
    out = {}
    for name in names:
        try:
            out[name] = METRICS[name].of(measuring)
        except ValueError as error:
            if asked or name == "fd":
                raise LogsnrError(f"{name}: {error}") from error
    return out
