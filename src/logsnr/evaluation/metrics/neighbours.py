"""Neighbours: what samples and data cover of each other, by balls that reach to each point's k-th neighbour.

    precision   share of samples in a ball of the data             recall     share of data in a ball of the samples
    density     balls of the data about a sample, over k           coverage   share of the data's balls with a sample

(1904.06991, k = 3; 2002.09797.)  A ball's radius is the distance to the k-th other point of its own set, taken once
from all of them; duplicates would have radius 0, so nothing here is bootstrapped.

Given the data, precision and density are means over samples, with the error of a mean.  Recall and coverage are not:
each is also taken between every two of up to ten parts of the samples and of the data, where as many samples meet as
many points of the data, so that its variance goes as 1/n.  The spread over the samples' parts at one part of the data,
over the root of their number, is the error, widened as Student's t asks: two of it cover as two of the others do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from logsnr.evaluation.metrics.moments import Estimated

NEIGHBOURS = 3
_BLOCK = 1024
_PARTS, _LEAST = 10, 50
"""Parts that errors of recall and coverage are taken from, at most, and the fewest rows that one has."""
NAMES = ("precision", "recall", "density", "coverage")


def neighbourhoods(x: Tensor, y: Tensor, k: int = NEIGHBOURS) -> dict[str, Estimated]:
    """Precision, recall, density and coverage of features x `[N, F]` against the data's y `[M, F]`.

    Rows come in an order that says nothing.  Errors are nan where there are too few rows for two parts.

    Raises:
        ValueError: if the feature counts differ, or a set has no more than k rows.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) <= k:
        raise ValueError(
            f"features of shapes {tuple(x.shape)} and {tuple(y.shape)}: give two matrices of more than {k} rows with "
            "the same number of columns"
        )
    inside, within, around, found = _counts(_Set.of(x, k), _Set.of(y, k))
    parts = min(_PARTS, len(x) // _LEAST, len(y) // _LEAST)
    recall = coverage = float("nan")
    if parts > 1:
        one, other = ([_Set.of(part, k) for part in torch.tensor_split(rows, parts)] for rows in (x, y))
        table = torch.tensor([[_shares(a, b) for b in other] for a in one], dtype=torch.float64)
        student = 1 + (2**2 + 1) / (4 * (parts - 1))  # t/z at z = 2, to first order in 1/(degrees of freedom)
        recall, coverage = (student * (table.var(0).mean(0) / parts).sqrt()).tolist()
    return {
        "precision": _mean(inside),
        "recall": Estimated(value=float(within.double().mean()), stderr=recall),
        "density": _mean(around / k),
        "coverage": Estimated(value=float(found.double().mean()), stderr=coverage),
    }


@dataclass(frozen=True)
class _Set:
    """Rows, and the radii of their balls."""

    rows: Tensor
    radii: Tensor

    @classmethod
    def of(cls, x: Tensor, k: int) -> _Set:
        return cls(x, _radii(x, k))


def _shares(x: _Set, y: _Set) -> list[float]:
    _, within, _, found = _counts(x, y)
    return [float(within.double().mean()), float(found.double().mean())]


def _counts(x: _Set, y: _Set) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whether a sample lies in a ball of the data; whether a point of the data in one of the samples; how many balls
    of the data lie about a sample; whether a ball of the data holds a sample."""
    around = torch.zeros(len(x.rows), dtype=torch.float64)
    within, found = (torch.zeros(len(y.rows), dtype=torch.bool) for _ in range(2))
    for first in range(0, len(x.rows), _BLOCK):
        rows = slice(first, first + _BLOCK)
        distances = _distances(x.rows[rows], y.rows)
        within |= (distances <= x.radii[rows, None]).any(0)
        inside = distances <= y.radii
        around[rows] = inside.sum(1).double()
        found |= inside.any(0)
    return around > 0, within, around, found


def _radii(x: Tensor, k: int) -> Tensor:
    """Distance of every row to the k-th nearest other one."""
    out = []
    for first in range(0, len(x), _BLOCK):
        distances = _distances(x[first : first + _BLOCK], x)
        rows = torch.arange(len(distances))
        distances[rows, rows + first] = torch.inf
        out.append(distances.topk(k, 1, largest=False).values[:, -1])
    return torch.cat(out)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Of all pairs; of many features by a^2 - 2 ab + b^2, which is off by rounding between equal rows."""
    few = a.shape[1] < 64
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist" if few else "use_mm_for_euclid_dist")


def _mean(each: Tensor) -> Estimated:
    values = each.double()
    return Estimated(value=float(values.mean()), stderr=float(values.std()) / len(values) ** 0.5)


def nearest_distances(queries: Tensor, references: Tensor) -> Tensor:
    """Euclidean distance per dimension (RMS) of every query `[N, *shape]` to its nearest reference: `[N]`.

    Beside the same number for held-out data, small distances tell memorised samples from new ones.

    Raises:
        ValueError: if there is no reference, or its shape is another.
    """
    if queries.shape[1:] != references.shape[1:] or len(references) == 0:
        raise ValueError(
            f"queries {tuple(queries.shape)} against references {tuple(references.shape)}: "
            "give at least one reference of the same shape"
        )
    q, r = queries.flatten(1).double(), references.flatten(1).double()
    nearest = torch.cdist(q, r).min(1).values
    distances: Tensor = nearest / q.shape[1] ** 0.5
    return distances
