"""KID of rows in memory, with the error of a U-statistic.

    KID(P, Q) = E k(x, x') + E k(y, y') - 2 E k(x, y),   k(x, y) = (x.y/F + 1)^3             (1801.01401)

With g(x) = E_y k(x, y) and h(x, x') = k(x, x') - g(x) - g(x'), KID = E_{x != x'} h + E k(y, y'), y being what it is.
Of n samples (Hoeffding 1948; for the MMD, 1611.04488, app. A)

    Var KID = 4 (n - 2)/(n (n - 1)) zeta_1 + 2/(n (n - 1)) zeta_2,   zeta_1 = Var E[h | x],   zeta_2 = Var h

so that the error is right where the two distributions are equal (zeta_1 = 0) as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from logsnr.evaluation.metrics.moments import Estimated, check_rows

_BLOCK = 1024


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """KID of features a `[N, F]` and b `[M, F]`: the unbiased squared MMD of the cubic kernel, over all pairs.

    Raises:
        ValueError: if a set has fewer than two rows or the feature counts differ.
    """
    return kernel_estimate(a, b).value


def kernel_estimate(x: Tensor, y: Tensor, within: float | None = None) -> Estimated:
    """KID of features x `[N, F]` to a fixed reference y `[M, F]`, unbiased; of two rows x without an error (nan).

    `within` is `kernel_within(y)`, where it is known.

    Raises:
        ValueError: if a set has fewer than two rows or the feature counts differ.
    """
    check_rows(x, y)
    n, m = len(x), len(y)
    within = kernel_within(y) if within is None else within
    towards = torch.cat([torch.stack([_cubic(a, b).sum(1) for b in _blocks(y)]).sum(0) for a in _blocks(x)]) / m
    squares, g = 0.0, torch.split(towards, _BLOCK)
    sums = [torch.zeros_like(part) for part in g]
    for i, j, a, b in _pairs(x):
        h = _cubic(a, b) - g[i][:, None] - g[j]
        if i == j:
            h.fill_diagonal_(0)
        else:
            sums[j] += h.sum(0)
        sums[i] += h.sum(1)
        squares += (1 + (j > i)) * float(h.square().sum())
    each = torch.cat(sums) / (n - 1)
    value = float(each.mean())
    second = squares / (n * (n - 1)) - value**2
    first = max(float(each.var()) - second / (n - 1), 0.0)
    variance = (4 * (n - 2) * first + 2 * max(second, 0.0)) / (n * (n - 1))
    return Estimated(value=value + within, stderr=math.sqrt(variance) if n > 2 else math.nan)


def kernel_within(y: Tensor) -> float:
    """The mean of k(y, y') over pairs of two different rows `[M, F]`."""
    total = sum((1 + (j > i)) * float(_cubic(a, b).sum()) for i, j, a, b in _pairs(y))
    total -= sum(float(((a.square().mean(1) + 1) ** 3).sum()) for a in _blocks(y))
    return total / (len(y) * (len(y) - 1))


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    """k(x, y) of all rows of a and b."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def _pairs(x: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Every two blocks of rows once, with their numbers."""
    for i, a in enumerate(_blocks(x)):
        for j, b in enumerate(_blocks(x[i * _BLOCK :]), i):
            yield i, j, a, b


def _blocks(x: Tensor) -> Iterator[Tensor]:
    """Rows of it in float64: a copy of all would take twice their memory."""
    return (part.to("cpu", torch.float64) for part in torch.split(x, _BLOCK))
