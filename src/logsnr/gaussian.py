"""Gaussians: covariances of any size in one form, functions of them, and how they come from samples.

    C = sum_k L_k u_k u_k^T + r (I - sum_k u_k u_k^T),      f(C) x = f(r) x + sum_k (f(L_k) - f(r)) u_k u_k^T x

An orthonormal basis u_k with variances L_k, and one variance r in every direction that it leaves out:

    full       all D eigenvectors of a covariance                                   a D x D matrix
    low-rank   the leading ones, isotropic beyond                                   a D x rank matrix
    cosine     the DCT-II of every axis but the first, and a rotation of that one   no matrix of the size of D

Cosines are the eigenvectors of every stationary field with mirrored edges, as images nearly are; a few samples tell
their variances well, since neighbours in frequency help each other.  All arithmetic is float64 (float32 on devices that
have none).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from logsnr.errors import LogsnrError, unknown

Kind = Literal["full", "low-rank", "cosine"]
KINDS: tuple[str, ...] = get_args(Kind)
FULL = 3072
"""Dimensions up to which "auto" takes a full covariance: its eigenvectors take some ten seconds and 75 MB."""
RANK = 64
"""Directions of a low-rank covariance unless told; a quarter of the samples where they are few."""
CONTEST = 4096
"""Samples at most by which "auto" compares kinds."""
TOLD_AT = 10.0
"""Noise at which "auto" compares them, in units of the data's spread: about where starts are used."""
NEIGHBOURS = 8.0
"""Samples that the mean over neighbouring frequencies counts for, beside those of a cosine itself."""


class Basis(Protocol):
    """r orthonormal directions of R^D."""

    def coordinates(self, x: Tensor) -> Tensor:
        """U^T x `[B, r]` of x `[B, D]`."""

    def combined(self, c: Tensor) -> Tensor:
        """U c `[B, D]` of c `[B, r]`."""

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by field."""


@dataclass(frozen=True, eq=False)
class Axes:
    """Directions as the columns `[D, r]` of a matrix."""

    columns: Tensor

    def coordinates(self, x: Tensor) -> Tensor:
        return x @ self.columns.to(x)

    def combined(self, c: Tensor) -> Tensor:
        return c @ self.columns.to(c).T

    def tensors(self) -> dict[str, Tensor]:
        return {"columns": self.columns}


@dataclass(frozen=True, eq=False)
class Cosines:
    """The DCT-II along every axis of a sample `[C, *space]` but the first, which is rotated by `mix [C, C]`."""

    mix: Tensor
    space: tuple[int, ...]

    def coordinates(self, x: Tensor) -> Tensor:
        return self._turned(x, lambda m: m)

    def combined(self, c: Tensor) -> Tensor:
        return self._turned(c, lambda m: m.T)

    def tensors(self) -> dict[str, Tensor]:
        return {"mix": self.mix}

    def _turned(self, x: Tensor, way: Callable[[Tensor], Tensor]) -> Tensor:
        """Every axis times its matrix, or its transpose."""
        out = x.reshape(len(x), len(self.mix), *self.space)
        for axis, matrix in enumerate((self.mix.T, *map(cosine_matrix, self.space)), 1):
            out = torch.tensordot(out, way(matrix).to(out), dims=([axis], [1])).movedim(-1, axis)
        return out.reshape(len(x), -1)


@lru_cache(maxsize=16)
def cosine_matrix(n: int) -> Tensor:
    """The orthonormal DCT-II `[n, n]`: row k is sqrt(2/n) cos(pi k (i + 1/2) / n), row 0 is 1/sqrt(n)."""
    at = torch.arange(n, dtype=torch.float64)
    rows = math.sqrt(2 / n) * torch.cos(math.pi / n * at[:, None] * (at + 0.5))
    rows[0] = 1 / math.sqrt(n)
    return rows


@dataclass(frozen=True, eq=False, kw_only=True)
class Covariance:
    """A covariance of D dimensions.

    Attributes:
        kind: "full", "low-rank" or "cosine".
        basis: its r directions.
        values: variance in each of them `[r]`, float64; with r < D one more, that of all other directions `[r + 1]`.
        dim: D.
    """

    kind: Kind
    basis: Basis
    values: Tensor
    dim: int

    @property
    def counts(self) -> Tensor:
        """How many directions each of the values stands for `[r]` or `[r + 1]`; their sum is D."""
        counts = torch.ones_like(self.values)
        counts[-1] += self.dim - len(counts)
        return counts

    @property
    def complete(self) -> bool:
        """Whether the basis spans everything."""
        return len(self.values) == self.dim

    def mapped(self, gain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """f(C) x `[B, D]`, with `gain` taking variances to the f of each."""
        g, c = gain(self.values.to(x)), self.basis.coordinates(x)
        if self.complete:
            return self.basis.combined(g * c)
        return self.basis.combined((g[..., :-1] - g[..., -1:]) * c).add_(g[..., -1:] * x)

    def products(self, x: Tensor, *others: Tensor) -> list[Tensor]:
        """Of each other vector (x itself if none): x_k other_k for every value, summed over the directions that it
        stands for, `[B, r]` or `[B, r + 1]`."""
        own, out = self.basis.coordinates(x), []
        for other in others or (x,):
            parts = own * (own if other is x else self.basis.coordinates(other))
            if not self.complete:
                parts = torch.cat([parts, ((x * other).sum(1) - parts.sum(1)).unsqueeze(1)], 1)
            out.append(parts)
        return out

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by name (`from_tensors`)."""
        return {"values": self.values, **self.basis.tensors()}

    def to(self, device: torch.device | str) -> Covariance:
        """The same on another device."""
        moved = {name: value.to(device) for name, value in self.basis.tensors().items()}
        return replace(self, basis=replace(self.basis, **moved), values=self.values.to(device))  # type: ignore[type-var]


def wide(x: Tensor) -> Tensor:
    """x `[B, *shape]` as float64 `[B, D]`; float32 on a device that has no float64."""
    return x.flatten(1).to(torch.float32 if x.device.type == "mps" else torch.float64)


def eigen(covs: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[K, D]` and eigenvectors (columns) of covariances; what rounding left of a zero becomes 0.

    Raises:
        ValueError: if one is not symmetric, or has a negative eigenvalue.
    """
    asymmetry, size = float((covs - covs.mT).abs().max()), float(covs.abs().max())
    tolerance = 100 * covs.shape[-1] * torch.finfo(covs.dtype).eps
    if asymmetry > tolerance * size:
        raise ValueError(
            f"covariance differs from its transpose by {asymmetry:.4g}: it must be symmetric; use (C + C^T)/2"
        )
    values, vectors = torch.linalg.eigh(covs.double())
    lowest = float(values.min())
    if lowest < -tolerance * size:
        raise ValueError(
            f"covariance has eigenvalue {lowest:.4g}: all must be >= 0; clamp them or add {-lowest:.4g} to the diagonal"
        )
    floor = covs.shape[-1] * torch.finfo(covs.dtype).eps * values.amax(1, keepdim=True)
    return torch.where(values > floor, values, torch.zeros_like(values)).to(covs), vectors.to(covs)


def from_tensors(kind: Kind, shape: tuple[int, ...], tensors: Mapping[str, Tensor], prefix: str) -> Covariance:
    """What `Covariance.tensors` tells, each name behind a prefix."""
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    values = own.pop("values")
    basis = Cosines(space=shape[1:], **own) if kind == "cosine" else Axes(**own)
    return Covariance(kind=kind, basis=basis, values=values, dim=math.prod(shape))


def enough(dim: int, kind: str, rank: int | None) -> int:
    """Samples from which a class is given a covariance of its own."""
    if rank is None and kind != "low-rank" and dim <= FULL:
        return 4 * dim
    return 20 * (rank or RANK)


def of_matrix(cov: Tensor) -> Covariance:
    """The full covariance of a matrix `[D, D]`.

    Raises:
        ValueError: as `eigen`.
    """
    (values,), (columns,) = eigen(cov.double()[None])
    return Covariance(kind="full", basis=Axes(columns), values=values, dim=len(cov))


def of_spectrum(variances: Tensor) -> Covariance:
    """The stationary field with one variance per cosine, `[C, *space]` (element 0 of every axis is the constant)."""
    c, *space = variances.shape
    basis = Cosines(torch.eye(c, dtype=torch.float64, device=variances.device), tuple(space))
    return Covariance(kind="cosine", basis=basis, values=variances.double().flatten(), dim=variances.numel())


@dataclass(frozen=True, eq=False, kw_only=True)
class Residuals:
    """Samples about the means of their classes.

    Attributes:
        x: samples `[N, *shape]`.
        means: `[K, D]`, float64.
        at: the class of each sample `[N]`.
    """

    x: Tensor
    means: Tensor
    at: Tensor

    @classmethod
    def of(cls, x: Tensor, at: Tensor | None = None) -> Residuals:
        """About their own means."""
        at = torch.zeros(len(x), dtype=torch.long, device=x.device) if at is None else at.to(x.device)
        classes, dim = int(at.max()) + 1, math.prod(x.shape[1:])
        dtype = torch.float32 if x.device.type == "mps" else torch.float64
        sums = torch.zeros(classes, dim, dtype=dtype, device=x.device)
        for part in _parts(len(x), dim):
            sums.index_add_(0, at[part], wide(x[part]))
        return cls(x=x, means=sums / torch.bincount(at, minlength=classes).unsqueeze(1).to(sums), at=at)

    @property
    def freedom(self) -> int:
        """Samples less means."""
        return len(self.x) - len(self.means)

    def rows(self) -> Iterator[Tensor]:
        """x - mean `[b, D]`, a chunk at a time."""
        for part in _parts(len(self.x), self.means.shape[1]):
            yield wide(self.x[part]) - self.means[self.at[part]]

    def every(self, stride: int, first: int) -> Residuals:
        """Every so many of them, about the same means."""
        return replace(self, x=self.x[first::stride], at=self.at[first::stride])


def fit(residuals: Residuals, kind: Kind | Literal["auto"] = "auto", rank: int | None = None) -> Covariance:
    """The covariance of samples about their means.

    "auto" is low-rank where a rank is given; else the better of two on samples that they were not fitted to, by the
    likelihood of noisy ones: cosines (for images), and full (up to `FULL` dimensions) or low-rank.

    Args:
        residuals: the samples.
        kind: of covariance.
        rank: of a low-rank one; `RANK` if None, a quarter of the samples where they are few.

    Raises:
        LogsnrError: if there are too few samples, or kind and rank do not fit.
    """
    shape = tuple(residuals.x.shape[1:])
    dim, freedom = math.prod(shape), residuals.freedom
    if kind != "auto" and kind not in KINDS:
        raise unknown("kind", kind, ["auto", *KINDS])
    if freedom < 1:
        raise LogsnrError(
            f"{len(residuals.x)} samples about {len(residuals.means)} means leave no covariance: give at least two "
            "per class, better some hundreds in all"
        )
    if kind == "cosine" and len(shape) < 2:
        raise LogsnrError(f"kind = 'cosine' of samples of shape {shape}: give [C, H, W], or take another kind")
    if rank is not None:
        if kind not in ("auto", "low-rank"):
            raise LogsnrError(f"rank = {rank} with kind = {kind!r}: leave one of them out")
        most = min(freedom, dim)
        if not 1 <= rank <= most:
            raise LogsnrError(
                f"rank = {rank}: {len(residuals.x)} samples of {dim} numbers about {len(residuals.means)} means have "
                f"rank 1 to {most}; give more samples, or a lower rank"
            )
        kind = "low-rank"
    if kind == "auto":
        kind = "full" if dim <= FULL else "low-rank"
        if len(shape) >= 2 and len(residuals.x) >= 4 * len(residuals.means):
            kind = _better(residuals, kind, "cosine")
    return _fitted(residuals, kind, rank)


def _fitted(residuals: Residuals, kind: Kind, rank: int | None = None) -> Covariance:
    if kind == "full":
        return _full(residuals)
    if kind == "cosine":
        return _cosine(residuals)
    return _low_rank(residuals, rank or max(min(RANK, residuals.freedom // 4, residuals.means.shape[1]), 1))


def _better(residuals: Residuals, *kinds: Kind) -> Kind:
    """The kind under which every second sample, with noise, is likeliest, fitted to the others.

    Of y = r + s w the mean of -2 log p(y) is  tr log(C + s^2) + E r^T (C + s^2)^-1 r + s^2 tr (C + s^2)^-1.
    """
    some = residuals.every(max(2 * len(residuals.x) // CONTEST, 1), 0)
    half, rest = some.every(2, 0), some.every(2, 1)
    noise = TOLD_AT**2 * sum(float(r.square().sum()) for r in half.rows()) / half.x.numel()

    def surprise(kind: Kind) -> float:
        found = _fitted(half, kind)
        noisy = found.values + noise
        inner = sum(float((found.products(r)[0] / noisy).sum()) for r in rest.rows()) / len(rest.x)
        return float((found.counts * (noisy.log() + noise / noisy)).sum()) + inner

    return min(kinds, key=surprise)


def _full(residuals: Residuals) -> Covariance:
    gram = torch.zeros_like(residuals.means[:1].T @ residuals.means[:1])
    for r in residuals.rows():
        gram += r.T @ r
    values, columns = torch.linalg.eigh(gram / residuals.freedom)
    return Covariance(kind="full", basis=Axes(columns), values=values.clamp(min=0), dim=len(gram))


def _low_rank(residuals: Residuals, rank: int, passes: int = 4) -> Covariance:
    """Leading eigenvectors by orthogonal iteration on a few more than asked for, then Rayleigh-Ritz."""
    dim = residuals.means.shape[1]
    rank = dim if rank == dim - 1 else rank  # the one direction left out is the rest
    generator = torch.Generator().manual_seed(0)
    width = min(rank + 16, dim)
    q = torch.randn(dim, width, generator=generator, dtype=torch.float64).to(residuals.means)
    for _ in range(passes):
        q = torch.linalg.qr(sum(r.T @ (r @ q) for r in residuals.rows()))[0]
    image = sum(r.T @ (r @ q) for r in residuals.rows()) / residuals.freedom
    values, turn = torch.linalg.eigh(q.T @ image)
    values, columns = values.flip(0)[:rank].clamp(min=0), (q @ turn.flip(1)[:, :rank]).contiguous()
    total = sum(float(r.square().sum()) for r in residuals.rows()) / residuals.freedom
    if rank < dim:
        rest = max(total - float(values.sum()), 0.0) / (dim - rank)
        values = torch.cat([values, values.new_tensor([rest])])
    return Covariance(kind="low-rank", basis=Axes(columns), values=values, dim=dim)


def _cosine(residuals: Residuals) -> Covariance:
    """Variances of cosines, each drawn towards the mean of those of about its frequency."""
    c, *space = residuals.x.shape[1:]
    channels = residuals.means.new_zeros(c, c)
    for r in residuals.rows():
        flat = r.reshape(len(r), c, -1).transpose(0, 1).reshape(c, -1)
        channels += flat @ flat.T
    basis = Cosines(torch.linalg.eigh(channels)[1], tuple(space))
    squares = torch.zeros_like(residuals.means[0])
    for r in residuals.rows():
        squares += basis.coordinates(r).square().sum(0)
    return _smoothed((squares / residuals.freedom).reshape(c, -1), basis, residuals.freedom)


def of_moments(products: Tensor, freedom: int) -> Covariance:
    """The covariance of cosines, as of samples, from sums `[C, C, *space]` of products of their residuals' DCT-II over
    the channels; `freedom` samples less means are behind them."""
    c, _, *space = products.shape
    flat = products.reshape(c, c, -1)
    mix = torch.linalg.eigh(flat.sum(2))[1]
    own = torch.einsum("ik,ijf,jk->kf", mix, flat, mix) / freedom
    return _smoothed(own, Cosines(mix, tuple(space)), freedom)


def _smoothed(own: Tensor, basis: Cosines, freedom: int) -> Covariance:
    """Variances of cosines `[C, F]`, each drawn towards the mean of those of about its frequency."""
    bins = _frequencies(basis.space).to(own.device)
    sums = own.new_zeros(len(own), int(bins.max()) + 1).index_add_(1, bins, own)
    near = (sums / torch.bincount(bins))[:, bins]
    values = (freedom * own + NEIGHBOURS * near) / (freedom + NEIGHBOURS)
    return Covariance(kind="cosine", basis=basis, values=values.flatten(), dim=values.numel())


def _frequencies(space: tuple[int, ...]) -> Tensor:
    """The frequency of every cosine, in whole waves across the longest axis; flat, the constant by itself."""
    longest = max(space)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) / n for n in space), indexing="ij")
    return (longest * sum(a.square() for a in axes).sqrt()).ceil().long().flatten()  # type: ignore[union-attr]


def _parts(n: int, dim: int) -> Iterator[slice]:
    """Slices of n samples of about 128 MB in float64."""
    size = max(2**24 // dim, 1)
    for first in range(0, n, size):
        yield slice(first, min(first + size, n))
