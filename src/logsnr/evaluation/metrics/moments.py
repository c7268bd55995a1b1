"""Moments of features, summed as they stream by, and the Frechet distance of the Gaussians that have them.

    FD(P, Q) = |mu_P - mu_Q|^2 + tr(C_P + C_Q - 2 (C_Q^{1/2} C_P C_Q^{1/2})^{1/2})             (1706.08500)

Of n samples x the estimate of FD moves, to first order, by the mean of its influence function (the infinitesimal
jackknife), with m = mu_P - mu_Q and the optimal map T = C_Q^{1/2} (C_Q^{1/2} C_P C_Q^{1/2})^{-1/2} C_Q^{1/2} of P to Q:

    IF(x) = 2 m.(x - mu_P) + (x - mu_P)^T (1 - T) (x - mu_P) + const,       stderr = std IF / sqrt n

That takes one decomposition where deleting groups takes one each, and a sample of rows where they take a matrix each.
Where P is Q, FD is of second order and the error up to 1.4 times too large.

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
        """FD of moments to this, and its error from some of their rows `[K, F]` (nan without).

        Where classes were dealt in equal numbers, `strata` `[K]` says which: the error is of draws within classes.

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
        value = float(gap.square().sum()) + traces - 2 * float(values.clamp(min=0).sqrt().sum())
        stderr = float("nan")
        if rows is not None and len(rows) > 1:
            kept = values > values[-1].clamp(min=0) * 1e-10
            quarter = self.root @ vectors[:, kept]
            del vectors
            quarter *= values[kept] ** -0.25  # T = quarter quarter^T
            influence = []
            for part in torch.split(rows, 1024):
                x = part.to("cpu", torch.float64) - moments.mean
                influence.append(2 * x @ gap + x.square().sum(1) - (x @ quarter).square().sum(1))
            each = torch.cat(influence)
            if strata is not None:
                sums = torch.zeros(int(strata.max()) + 1, dtype=each.dtype).index_add_(0, strata, each)
                each = each - (sums / torch.bincount(strata).clamp(min=1))[strata]
            stderr = float(each.std()) / moments.n**0.5
        return Estimated(value=max(value, 0.0), stderr=stderr)

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
