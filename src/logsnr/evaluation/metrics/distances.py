"""Distances between two sets of features that are in memory, with bootstrapped errors.

    FD(P, Q)  = |mu_P - mu_Q|^2 + tr(C_P + C_Q - 2 (C_P^{1/2} C_Q C_P^{1/2})^{1/2})          (1706.08500)
    KID(P, Q) = E k(x, x') + E k(y, y') - 2 E k(x, y),   k(x, y) = (x.y/F + 1)^3             (1801.01401)

An FD belongs to its features: it is "FID" in Inception-v3's pool features only, "FD (features: X)" in any other.  FD is
biased upwards, the more so the fewer samples; KID, a U-statistic, is not, and may come out below 0.

Standard errors are bootstrapped over the samples, the reference being what it is: replicate r draws N samples with
repetition, i.e. integer weights w_r that sum to N.  Pairs of one sample with itself are left out of a replicate as they
are of the estimate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from logsnr.evaluation.metrics.moments import Estimated, Moments, psd_sqrt

_BLOCK = 1024
"""Rows of a kernel matrix in memory at a time."""


@dataclass(frozen=True)
class Reference:
    """A set of features with what distances to it need, computed once.

    Args:
        features: `[M, F]`, at least two rows.

    Raises:
        ValueError: if it is no such matrix.
    """

    features: Tensor

    def __post_init__(self) -> None:
        _check(self.features, self.features)
        object.__setattr__(self, "features", self.features.double())

    @cached_property
    def mean(self) -> Tensor:
        """mu_Q `[F]`."""
        return self.features.mean(0)

    @cached_property
    def covariance(self) -> Tensor:
        """C_Q `[F, F]`, unbiased."""
        return Moments.of(self.features).covariance

    @cached_property
    def root(self) -> Tensor:
        """C_Q^{1/2}."""
        return psd_sqrt(self.covariance)

    @cached_property
    def within(self) -> float:
        """Mean of k(y, y') over pairs of two different rows."""
        m, total = len(self.features), 0.0
        for rows in torch.split(self.features, _BLOCK):
            total += float(cubic(rows, self.features).sum())
        return (total - float(cubic_diagonal(self.features).sum())) / (m * (m - 1))

    def frechet(self, a: Tensor, counts: Tensor | None = None) -> Estimated:
        """FD of features `[N, F]`, with its error from bootstrap weights `[R, N]` (nan without)."""
        x = self._other(a)
        few = len(x) < x.shape[1]
        through = x @ self.covariance if few else x

        def distance(weights: Tensor) -> float:
            n, rows = weights.sum(), weights > 0
            mean, scale = weights @ x / n, (weights[rows, None] / (n - 1)).sqrt()
            half = (x[rows] - mean) * scale  # C_P = half^T half
            # The eigenvalues of C_P C_Q, from matrices of [F, F], or of [N, N] where samples are fewer than features.
            if few:
                product = half @ ((through[rows] - weights @ through / n) * scale).T
            else:
                product = self.root @ (half.T @ half) @ self.root
            cross = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()
            gap = (mean - self.mean).square().sum()
            return float((gap + half.square().sum() + self.covariance.trace() - 2 * cross).clamp(min=0))

        return _estimated(distance(torch.ones_like(x[:, 0])), counts, lambda c: [distance(w.to(x)) for w in c])

    def kernel(self, a: Tensor, counts: Tensor | None = None) -> Estimated:
        """KID of features `[N, F]`, unbiased, with its error from bootstrap weights `[R, N]` (nan without).

        Where the two distributions are equal the error is too large, by at most sqrt(3) (the naive bootstrap of a
        degenerate U-statistic).
        """
        x = self._other(a)
        weights = torch.ones(1, len(x), dtype=x.dtype, device=x.device)
        if counts is not None:
            weights = torch.cat([weights, counts.to(x)])
        pairs, cross = weights.new_zeros(len(weights)), torch.zeros_like(x[:, 0])
        for first, rows in zip(range(0, len(x), _BLOCK), torch.split(x, _BLOCK), strict=True):
            part = slice(first, first + len(rows))
            pairs += ((weights[:, part] @ cubic(rows, x)) * weights).sum(1)
            for others in torch.split(self.features, _BLOCK):
                cross[part] += cubic(rows, others).sum(1)
        squares = weights.square()
        pairs = (pairs - squares @ cubic_diagonal(x)) / (weights.sum(1) ** 2 - squares.sum(1))
        values = pairs + self.within - 2 * (weights @ cross) / (weights.sum(1) * len(self.features))
        return _estimated(float(values[0]), counts, lambda _: values[1:].tolist())

    def _other(self, a: Tensor) -> Tensor:
        _check(a, self.features)
        return a.to(self.features)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of Gaussians fitted to features a `[N, F]` and b `[M, F]`, in float64.

    Raises:
        ValueError: if a set has fewer than two rows or the feature counts differ.
    """
    _check(a, b)
    return Reference(b).frechet(a).value


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """KID of features a `[N, F]` and b `[M, F]`: the unbiased squared MMD of the cubic kernel, over all pairs.

    Raises:
        ValueError: if a set has fewer than two rows or the feature counts differ.
    """
    _check(a, b)
    return Reference(b).kernel(a).value


def bootstrap_counts(n: int, replicates: int, *, generator: torch.Generator) -> Tensor:
    """How often each of n samples is drawn in each replicate: float64 `[replicates, n]`, rows sum to n.

    Raises:
        ValueError: if there are fewer than 2 samples or replicates.
    """
    if min(n, replicates) < 2:
        raise ValueError(f"n = {n}, replicates = {replicates}: a bootstrap needs at least 2 of each")
    drawn = torch.randint(n, (replicates, n), generator=generator, device=generator.device)
    counts = torch.zeros(replicates, n, dtype=torch.float64, device=generator.device)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts))


def _check(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"features of shapes {tuple(a.shape)} and {tuple(b.shape)}: give two matrices of at least 2 rows "
            "with the same number of columns"
        )


def _estimated(value: float, counts: Tensor | None, replicates: Callable[[Tensor], list[float]]) -> Estimated:
    if counts is None:
        return Estimated(value=value, stderr=float("nan"))
    values = torch.tensor(replicates(counts), dtype=torch.float64)
    # A replicate that draws one sample alone has no pair, hence no KID (of n = 4, one in 64).
    return Estimated(value=value, stderr=float(values[values.isfinite()].std()))


def cubic(a: Tensor, b: Tensor) -> Tensor:
    """k(x, y) of all rows of a and b."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def cubic_diagonal(a: Tensor) -> Tensor:
    """k(x, x) of every row."""
    out: Tensor = (a.square().mean(1) + 1) ** 3
    return out
