"""Sets that one can project on: the interface, and the closed forms (subspaces, spheres, products)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


class ReferenceSet(ABC):
    """A closed set K in the space of samples, that one can project on.

    Attributes:
        shape: shape of one sample.
    """

    shape: tuple[int, ...]

    @abstractmethod
    def project(self, y: Tensor) -> Tensor:
        """The nearest point of K to each `y [B, *shape]`; one of them where there are several."""

    def distance(self, y: Tensor) -> Tensor:
        """dist_K `[B]`."""
        return (y - self.project(y)).flatten(1).square().sum(1).sqrt()

    def _check(self, y: Tensor) -> Tensor:
        if tuple(y.shape[1:]) != self.shape or y.ndim != len(self.shape) + 1:
            raise ValueError(
                f"states of shape {tuple(y.shape)} against a reference of samples {self.shape}: "
                f"give [B, {', '.join(map(str, self.shape))}]"
            )
        return y


@runtime_checkable
class Smoothed(Protocol):
    """A set with a smoothed squared distance in closed form."""

    def smoothed_squared_distance(self, y: Tensor, sigma: float | Tensor) -> Tensor:
        """dist_K^2(y, sigma) `[B]`."""
        ...


class Flat(ReferenceSet):
    """An affine subspace: offset + span(basis).

    Its smoothed squared distance, with the uniform measure, is the squared distance itself up to a constant: on a
    subspace the ideal denoiser is the projection at every noise level.

    Args:
        basis: `[D, d]`, linearly independent columns; orthonormalised here.
        offset: `[D]`, None for the origin.

    Raises:
        ValueError: if a shape does not fit or columns are dependent.
    """

    def __init__(self, basis: Tensor, offset: Tensor | None = None) -> None:
        if basis.ndim != 2:
            raise ValueError(f"basis has shape {tuple(basis.shape)}: give [D, d], one column per direction")
        offset = basis.new_zeros(len(basis)) if offset is None else offset
        if offset.shape != basis.shape[:1]:
            raise ValueError(f"offset {tuple(offset.shape)} does not fit basis {tuple(basis.shape)}: [{len(basis)}]")
        rank = int(torch.linalg.matrix_rank(basis)) if basis.numel() else 0
        if rank < basis.shape[1]:
            raise ValueError(f"basis {tuple(basis.shape)} has rank {rank}: its columns must be linearly independent")
        self.basis = torch.linalg.qr(basis)[0]
        self.offset = offset
        self.shape = (len(basis),)

    def project(self, y: Tensor) -> Tensor:
        q, offset = self.basis.to(y), self.offset.to(y)
        nearest: Tensor = offset + (self._check(y) - offset) @ q @ q.T
        return nearest

    def smoothed_squared_distance(self, y: Tensor, sigma: float | Tensor) -> Tensor:
        """dist_K^2 `[B]` at every sigma, up to a constant of the measure."""
        squared: Tensor = (y - self.project(y)).square().sum(dim=1)
        return squared


class Sphere(ReferenceSet):
    """The points at one distance from a centre; its own centre projects to the point along the first axis.

    Args:
        centre: `[D]`.
        radius: in (0, inf).

    Raises:
        ValueError: if the radius is out of range or the centre has more than one axis.
    """

    def __init__(self, centre: Tensor, radius: float) -> None:
        if centre.ndim != 1 or len(centre) == 0:
            raise ValueError(f"centre has shape {tuple(centre.shape)}: give [D]")
        if not 0 < radius < math.inf:
            raise ValueError(f"radius = {radius}: must be in (0, inf)")
        self.centre = centre
        self.radius = radius
        self.shape = (len(centre),)

    def project(self, y: Tensor) -> Tensor:
        ray = self._check(y) - self.centre.to(y)
        length = ray.norm(dim=1, keepdim=True)
        first = torch.zeros_like(ray)
        first[:, 0] = 1
        return self.centre.to(y) + self.radius * torch.where(length > 0, ray / length, first)


class Product(ReferenceSet):
    """K_1 x K_2 x ...: consecutive coordinates, each group with its own set; squared distances add.

    Raises:
        ValueError: if there is no set, or one has samples of more than one axis.
    """

    def __init__(self, sets: Sequence[ReferenceSet]) -> None:
        if not sets or any(len(s.shape) != 1 for s in sets):
            raise ValueError(f"a product of {[s.shape for s in sets]}: give at least one set, each of samples [D]")
        self.sets = tuple(sets)
        self.shape = (sum(s.shape[0] for s in sets),)

    def project(self, y: Tensor) -> Tensor:
        parts = torch.split(self._check(y), [s.shape[0] for s in self.sets], dim=1)
        return torch.cat([s.project(part) for s, part in zip(self.sets, parts, strict=True)], 1)

    def smoothed_squared_distance(self, y: Tensor, sigma: float | Tensor) -> Tensor:
        """The sum of the factors' `[B]`.

        Raises:
            ValueError: if a factor has no closed form of it (a sphere).
        """
        parts = torch.split(self._check(y), [s.shape[0] for s in self.sets], dim=1)
        total = y.new_zeros(len(y))
        for s, part in zip(self.sets, parts, strict=True):
            if not isinstance(s, Smoothed):
                raise ValueError(
                    f"a {type(s).__name__} has no smoothed distance here: use Points, Flat, or products of them"
                )
            total = total + s.smoothed_squared_distance(part, sigma)
        return total
