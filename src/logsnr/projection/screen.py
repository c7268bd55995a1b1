"""The screening of a large set: every squared distance at once, to within bounds, from low-precision matrix products.

Of centred points p and states o, ||p||^2 - 2 o.p orders the points by distance.  Along the few directions in which the
set varies most (its axes) the product is float32; what is left of p and o, small, is multiplied in bfloat16 where the
processor does that natively:

    p = A h + t,   o = A g + r        o.p = g.h + r.t        (A orthonormal, t and r orthogonal to it up to rounding)

Elsewhere there are no axes, t = p, r = o, and all of it is float32.  Float32 alone would be simpler, and serves single
queries as well; batches are what bfloat16 is for.  On CIFAR-10 at sigma .5 / 3 / 15, 16 states per call are 23 / 7.9 /
13 times faster than a search in float64, with float32 alone 13 / .9 / 5.3 times; 64 states at .5 / 3 are 15 / 5.7
against 8.2 / 3.2 times faster (docs/results/ideal-denoiser.md).  Two bounds come with a score: the worst case
decides who may be the nearest, and the size of a random rounding decides whose weight is known well enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

WIDTH = 1024
"""Points per product when they are averaged; the partial sums are added in float32."""
BLOCK = 2**18
"""Numbers per block of work: small enough for caches, and for memory that is used again instead of paged in."""


class Probe(NamedTuple):
    """States as the products need them: minus the centre, along the axes, the rest; and noise levels, `[B, ...]`."""

    offset: Tensor
    head: Tensor
    tail: Tensor
    sigma: Tensor

    def rows(self, index: Tensor) -> Probe:
        return Probe(*(part[index] for part in self))


@dataclass(frozen=True, kw_only=True)
class Screen:
    """Low-precision copy of a set, with what its rounding bounds need.

    Attributes:
        centre: mean of the points `[D]`, wide.
        axes: `[D, k]`, wide, orthonormal; k = 0 for a float32 screen.
        head: points along the axes `[M, k]`, float32.
        tail: what is left of them `[M, D]`, bfloat16 or float32.
        columns: the same, transposed; contiguous where it is bfloat16.
        squares: ||p||^2 `[M]`.
        risks: ||t||^2 (||p||^2 + its mean) and ||t||^2 `[M, 2]`: how much the rounding of a weight matters, of a point.
        spread: Frobenius norm of the covariance of the tails, from a sample.
    """

    centre: Tensor
    axes: Tensor
    head: Tensor
    tail: Tensor
    columns: Tensor
    squares: Tensor
    risks: Tensor
    spread: float

    @classmethod
    def of(cls, flat: Tensor, wide: torch.dtype, *, half: bool | None = None) -> Screen:
        """The screen of points `[M, D]`; `half`: bfloat16 tails, by default where they are fast and D is large."""
        half = _half_is_fast(flat) if half is None else half
        m, d = flat.shape
        sums = [flat[part].to(wide).sum(0) for part in blocks(m, d)]
        centre = (torch.stack(sums).sum(0) / m).float().to(wide)
        axes = _axes(flat[:: max(1, m // 4096)].to(wide) - centre, min(d, m) // 16 if half else 0)
        head = torch.empty(m, axes.shape[1], device=flat.device)
        tail = torch.empty(m, d, dtype=torch.bfloat16 if half else torch.float32, device=flat.device)
        squares, rest = (torch.empty(m, device=flat.device) for _ in range(2))
        for part in blocks(m, d):
            points = flat[part].to(wide) - centre
            squares[part] = points.square().sum(1)
            head[part] = points @ axes
            points -= head[part].to(wide) @ axes.T
            rest[part] = points.square().sum(1)
            tail[part] = points
        some = tail[:: max(1, m // WIDTH)].float()
        pairs = (some @ some.T).square_().fill_diagonal_(0).sum() / max(1, len(some) * (len(some) - 1))
        return cls(
            centre=centre, axes=axes, head=head, tail=tail, columns=tail.T.contiguous() if half else tail.T,
            squares=squares, risks=torch.stack([rest * (squares + squares.mean()), rest], 1),
            spread=math.sqrt(float(pairs)),
        )  # fmt: skip

    @property
    def radius(self) -> float:
        """Largest ||p||."""
        return math.sqrt(float(self.squares.max()))

    @property
    def reach(self) -> float:
        """Largest ||t||."""
        return math.sqrt(float(self.risks[:, 1].max()))

    def probe(self, y: Tensor, sigma: Tensor) -> Probe:
        offset = y - self.centre
        head = (offset @ self.axes).float()
        return Probe(offset, head, offset - head.to(y) @ self.axes.T, sigma)

    def score(self, probe: Probe) -> Tensor:
        """||p||^2 - 2 o.p `[B, M]`, float32: squared distances, up to ||o||^2."""
        out = torch.empty(len(probe.head), len(self.tail), device=self.tail.device)
        head, tail = probe.head.T, probe.tail.to(self.tail).T
        for part in blocks(len(self.tail), len(out)):
            product = self.head[part] @ head  # points first: the layout that matrix libraries multiply fastest
            product += self.tail[part] @ tail
            out[:, part] = torch.sub(self.squares[part, None], product, alpha=2).T
        return out

    def slack(self, probe: Probe) -> Tensor:
        """Worst-case error of the difference of two scores, in any order of summation `[B, 1]`.

        A product of D terms rounds its factors and its result (u each) and sums in float32, gamma_D = D v / (1 - D v).
        """
        u, v = self._roundoff(), 2.0**-24
        length, rest = (part.norm(dim=1, keepdim=True) for part in (probe.offset, probe.tail))
        n = (self.tail.shape[1] + 8) * v
        gamma = n / (1 - n) if n < 1 else math.inf
        along = probe.head.to(length).norm(dim=1, keepdim=True)
        product = (3.1 * u + gamma) * rest * self.reach
        product = product + ((3.1 * _single() + gamma) * along + 8 * v * length) * self.radius
        bound: Tensor = 2 * (2 * product + 8 * v * self.radius**2)
        return bound

    def noise(self, probe: Probe) -> Tensor:
        """Typical error of a log-weight, per unit of ||t|| `[B, 1]`.

        Rounded factors err independently: u |r| |t| / sqrt(D) in the product.  The rounding of a long sum is a random
        walk of about v |r| |t| / 5 (Higham and Mary, SIAM J. Sci. Comput. 42(5), 2020, on data of mean zero); taken
        here: v |r| |t|, and v |t| times the radius for squares and results.  Tests measure both.
        """
        rest, v = probe.tail.norm(dim=1, keepdim=True), 2.0**-24
        grain = self._roundoff() / math.sqrt(self.tail.shape[1]) * rest + v * (rest + self.radius)
        noise: Tensor = grain / probe.sigma.square()
        return noise

    def sum(self, share: Tensor) -> Tensor:
        """sum_i share_i p_i `[B, D]` of float32 shares, wide."""
        total = torch.zeros(self.columns.shape[0], len(share), device=share.device)
        for i in range(0, share.shape[1], WIDTH):
            part = slice(i, i + WIDTH)
            total += self.columns[:, part] @ share[:, part].to(self.tail).T
        along = (share @ self.head).to(self.axes) @ self.axes.T
        return share.sum(1, keepdim=True).to(along) * self.centre + along + total.T

    def doubt(self, probe: Probe) -> tuple[Tensor, Tensor]:
        """What rounding does to x0 through a point that has all the weight, squared, in two parts.

        A point errs by noise ||t|| in its log-weight, which moves x0 by that times ||p - x0||, and by u ||t|| in its
        contribution, independently of the others: squared errors add with squared weights.  The rounding of the state
        moves all log-weights at once, and x0 by the covariance of the tails; partial sums are rounded too.

        Returns:
            `[B, 2]`, which `self.risks [M, 2]` turn into the first part for each point; `[B, 1]`, the second, per
            squared weight of all points together.
        """
        u, noise = self._roundoff(), self.noise(probe)
        blur = u / 4 * math.sqrt(float(self.risks[:, 1].mean()) / math.ceil(len(self.tail) / WIDTH))
        each = torch.cat([noise.square(), torch.full_like(noise, u * u / 2)], 1)
        return each, (noise * self.spread / 2).square() + blur**2

    def _roundoff(self) -> float:
        """Unit roundoff of the factors of the tails' product."""
        return 2.0**-8 if self.tail.dtype == torch.bfloat16 else _single()


def blocks(count: int, width: int) -> Iterator[slice]:
    """Slices of so many rows of so many numbers that go into one block of work."""
    size = max(1, BLOCK // width)
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def _axes(some: Tensor, count: int) -> Tensor:
    """`[D, count]`: orthonormal, near the directions of largest variance, by subspace iteration from some points."""
    axes = some.T[:, : min(count, len(some))]
    if not count:
        return axes
    rough = some.float()
    for _ in range(2):
        axes = (rough.T @ (rough @ torch.linalg.qr(axes.float())[0])).to(some)
    basis: Tensor = torch.linalg.qr(axes)[0]
    return basis


def _half_is_fast(flat: Tensor) -> bool:
    """Whether the processor multiplies bfloat16 natively, and the sums are so long that its rounding averages out."""
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return flat.device.type == "cpu" and flat.shape[1] >= 1024 and bool(native())


def _single() -> float:
    """Unit roundoff of the factors of a float32 product: of TF32 or bfloat16 where PyTorch is allowed to use them."""
    return {"highest": 2.0**-24, "high": 2.0**-11}.get(torch.get_float32_matmul_precision(), 2.0**-8)
