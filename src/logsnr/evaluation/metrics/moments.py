"""Moments of features, summed as they stream by, and the Frechet distance of the Gaussians that have them.

    FD(P, Q) = |mu_P - mu_Q|^2 + tr(C_P + C_Q - 2 (C_Q^{1/2} C_P C_Q^{1/2})^{1/2})             (1706.08500)

Of n samples x the estimate of FD moves, to first order, by the mean of its influence function (the infinitesimal
jackknife), with m = mu_P - mu_Q and the optimal map T = C_Q^{1/2} (C_Q^{1/2} C_P C_Q^{1/2})^{-1/2} C_Q^{1/2} of P to Q:

    IF(x) = 2 m.(x - mu_P) + (x - mu_P)^T (1 - T) (x - mu_P) + const,       stderr = std IF / sqrt n

That takes one decomposition where deleting groups takes one each, and a sample of rows where they take a matrix each.
Where P is Q, FD is of second order and the error up to 1.4 times too large.  Of two sets of samples from the same noise
the difference of their FDs moves by the mean of IF - IF', so that it has an error of its own, smaller than either's.

The bias of FD falls as a/n (1911.07023) + b/n^2.  Random halves and quarters of the samples take both away:

    FD_inf = 8/3 FD_n - 2 FD_{n/2} + 1/3 FD_{n/4},         FD_line = 2 FD_n - FD_{n/2}

To first order the noise is that of FD_n; the gap to the straight line in 1/n is counted as an error beside it.  (The
line alone is off by more than its error where FD is small.)  It takes `ENOUGH` samples per feature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ENOUGH = 8
"""Samples per feature from which the bias of FD is a/n + b/n^2 to a fraction of its error."""


@dataclass(frozen=True, kw_only=True)
class Estimated:
    """A measured distance.

    Attributes:
        value: the estimate from all samples.
        stderr: its standard error, for a fixed reference.
    """

    value: float
    stderr: float


@dataclass(frozen=True, kw_only=True)
class Influenced:
    """A distance with what each sample moves it by, to first order.

    Attributes:
        value: the distance.
        influence: of some of the samples, centred, `[K]`; empty where nobody asked.
        n: how many samples there are.
        strata: how many means were taken off the influence: 1, or the number of classes dealt.
    """

    value: float
    influence: Tensor
    n: int
    strata: int = 1

    @property
    def estimated(self) -> Estimated:
        """With its standard error; nan where no influence is known."""
        return Estimated(value=self.value, stderr=self._spread(self.influence))

    def beyond(self, other: Influenced) -> Estimated:
        """This less the other, of samples from the same noise in the same order, with the error of the difference."""
        return Estimated(value=self.value - other.value, stderr=self._spread(self.influence - other.influence))

    def _spread(self, each: Tensor) -> float:
        if len(each) <= self.strata:
            return float("nan")
        return float((each.square().sum() / (len(each) - self.strata) / self.n).sqrt())


class Moments:
    """Number, mean `[F]` and centred second moment `[F, F]` of rows, in float64 on the CPU; grown by `add`."""

    def __init__(self, width: int) -> None:
        self.n = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.scatter = torch.zeros(width, width, dtype=torch.float64)

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """The moments of features `[N, F]`."""
        out = cls(x.shape[1])
        out.add(x)
        return out

    def add(self, x: Tensor) -> None:
        """Take in rows `[N, F]` (Chan, Golub & LeVeque 1979)."""
        if len(x) == 0:
            return
        x = x.to("cpu", torch.float64)
        mean = x.mean(0)
        x = x - mean
        self.scatter.addmm_(x.T, x)
        self._join(len(x), mean)

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets of rows."""
        out = Moments(len(self.mean))
        out.scatter.add_(self.scatter).add_(other.scatter)
        out.n, out.mean = self.n, self.mean.clone()
        out._join(other.n, other.mean)
        return out

    def _join(self, n: int, mean: Tensor) -> None:
        gap, total = mean - self.mean, self.n + n
        self.scatter.addr_(gap, gap, alpha=self.n * n / max(total, 1))
        self.mean += gap * (n / max(total, 1))
        self.n = total

    @property
    def covariance(self) -> Tensor:
        """Unbiased, `[F, F]`.

        Raises:
            ValueError: of fewer than two rows.
        """
        if self.n < 2:
            raise ValueError(f"{self.n} rows have no covariance: give at least 2")
        return self.scatter / (self.n - 1)


class Normal:
    """What FD is measured to: a mean `[F]` and a covariance `[F, F]`, whose root is taken once."""

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        self.mean, self.trace, self.root = mean, float(covariance.trace()), psd_sqrt(covariance)

    def frechet(self, moments: Moments, rows: Tensor | None = None, strata: Tensor | None = None) -> Estimated:
        """FD of moments to this, with its error; arguments as of `influenced`."""
        return self.influenced(moments, rows, strata).estimated

    def influenced(self, moments: Moments, rows: Tensor | None = None, strata: Tensor | None = None) -> Influenced:
        """FD of moments to this, and the influence of some of their rows `[K, F]`.

        Where classes were dealt in equal numbers, `strata` `[K]` says which: the influence is that of draws within
        classes.  Where no class has two rows, they count as draws of classes too.

        Raises:
            ValueError: of fewer than two rows, or another number of features.
        """
        if len(moments.mean) != len(self.mean):
            raise ValueError(
                f"features of {len(moments.mean)} numbers against {len(self.mean)}: give one feature space"
            )
        gap, product = moments.mean - self.mean, moments.covariance
        traces = float(product.trace()) + self.trace
        product = self.root @ (product @ self.root)
        vectors = torch.empty(0)
        if rows is None:
            values = torch.linalg.eigvalsh(product)
        else:
            values, vectors = torch.linalg.eigh(product)
        del product
        value = max(float(gap.square().sum()) + traces - 2 * float(values.clamp(min=0).sqrt().sum()), 0.0)
        if rows is None:
            return Influenced(value=value, influence=torch.empty(0), n=moments.n)
        kept = values > values[-1].clamp(min=0) * 1e-10
        quarter = self.root @ vectors[:, kept]
        del vectors
        quarter *= values[kept] ** -0.25  # T = quarter quarter^T
        influence = []
        for part in torch.split(rows, 1024):
            x = part.to("cpu", torch.float64) - moments.mean
            influence.append(2 * x @ gap + x.square().sum(1) - (x @ quarter).square().sum(1))
        each = torch.cat(influence)
        at = (
            torch.zeros(len(each), dtype=torch.long) if strata is None else torch.unique(strata, return_inverse=True)[1]
        )
        if int(at.max()) + 1 >= len(each):
            at = torch.zeros_like(at)
        count = torch.bincount(at)
        each = each - (torch.zeros(len(count), dtype=each.dtype).index_add_(0, at, each) / count)[at]
        return Influenced(value=value, influence=each, n=moments.n, strata=len(count))

    def extrapolated(self, quarters: Sequence[Moments], whole: Estimated) -> Estimated:
        """FD of infinitely many samples, from that of all and the moments of four equal parts of them.

        Raises:
            ValueError: if there are fewer than `ENOUGH` samples per feature.
        """
        n, least = sum(part.n for part in quarters), ENOUGH * len(self.mean)
        if n < least:
            raise ValueError(f"{n} samples of {len(self.mean)} features: the limit takes {least} or more")
        quarter = sum(self.frechet(part).value for part in quarters) / 4
        half = sum(self.frechet(quarters[i] + quarters[i + 1]).value for i in (0, 2)) / 2
        line, value = 2 * whole.value - half, 8 / 3 * whole.value - 2 * half + quarter / 3
        return Estimated(value=value, stderr=math.hypot(whole.stderr, value - line))


def psd_sqrt(matrix: Tensor) -> Tensor:
    """The root of a positive semidefinite matrix; what is below 0 by rounding counts as 0."""
    values, vectors = torch.linalg.eigh(matrix)
    vectors = vectors * values.clamp(min=0) ** 0.25
    root: Tensor = vectors @ vectors.T
    return root


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """FD of features a `[N, F]` and b `[M, F]`, in float64.

    Raises:
        ValueError: if a set has fewer than two rows or the feature counts differ.
    """
    check_rows(a, b)
    reference = Moments.of(b)
    return Normal(reference.mean, reference.covariance).frechet(Moments.of(a)).value


def check_rows(a: Tensor, b: Tensor) -> None:
    """Refuse what are no two matrices of one width and at least two rows.

    Raises:
        ValueError: with the shapes.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"features of shapes {tuple(a.shape)} and {tuple(b.shape)}: give two matrices of at least 2 rows "
            "with the same number of columns"
        )
