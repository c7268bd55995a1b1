"""Metrics: distances between sets of samples, in the features or pixels they are given.

    FD(P, Q) = |mu_P - mu_Q|^2 + tr(C_P + C_Q - 2 (C_P^{1/2} C_Q C_P^{1/2})^{1/2})          (1706.08500)

An FD belongs to its features: it is "FID" in Inception-v3's pool features only, "FD (features: X)" in any other.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of Gaussians fitted to features a `[N, F]` and b `[M, F]`, in float64.

    Raises:
        ValueError: if a set has fewer than two rows or the feature counts differ.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"features of shapes {tuple(a.shape)} and {tuple(b.shape)}: give two matrices of at least 2 rows "
            "with the same number of columns"
        )
    a, b = a.double(), b.double()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    root = _psd_sqrt(cov_a)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean + cov_a.trace() + cov_b.trace() - 2 * cross).clamp(min=0))


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


def _psd_sqrt(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root
