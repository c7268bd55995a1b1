"""KID of rows in memory, with the error of a U-statistic, and no bootstrap.

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

from logsnr.evaluation.metrics.distances import cubic, cubic_diagonal
from logsnr.evaluation.metrics.moments import Estimated

_BLOCK = 1024


def kernel_estimate(x: Tensor, y: Tensor) -> Estimated:
    """KID of features x `[N, F]` to a fixed reference y `[M, F]`, unbiased.

    Raises:
        ValueError: if a set has fewer than three rows or the feature counts differ.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 3:
        raise ValueError(
            f"features of shapes {tuple(x.shape)} and {tuple(y.shape)}: give two matrices of at least 3 rows with the "
            "same number of columns"
        )
    n, m = len(x), len(y)
    towards = torch.cat([torch.stack([cubic(a, b).sum(1) for b in _blocks(y)]).sum(0) for a in _blocks(x)]) / m
    within = sum((1 + (j > i)) * float(cubic(a, b).sum()) for i, j, a, b in _pairs(y))
    within = (within - sum(float(cubic_diagonal(a).sum()) for a in _blocks(y))) / (m * (m - 1))
    squares, g = 0.0, torch.split(towards, _BLOCK)
    sums = [torch.zeros_like(part) for part in g]
    for i, j, a, b in _pairs(x):
        h = cubic(a, b) - g[i][:, None] - g[j]
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
    return Estimated(value=value + within, stderr=math.sqrt(variance))


def _pairs(x: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Every two blocks of rows once, with their numbers."""
    for i, a in enumerate(_blocks(x)):
        for j, b in enumerate(_blocks(x[i * _BLOCK :]), i):
            yield i, j, a, b


def _blocks(x: Tensor) -> Iterator[Tensor]:
    """Rows of it in float64: a copy of all would take twice their memory."""
    return (part.to("cpu", torch.float64) for part in torch.split(x, _BLOCK))
