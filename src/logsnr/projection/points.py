"""Finite sets: exact nearest neighbours and softmax means among up to 60,000 points of 3,072 numbers.

A finite set is searched exactly, in two passes.  ||p||^2 - 2 y.p of centred float32 values, one matrix product, knows
every squared distance to within a worst-case rounding bound; the points whose weight could matter within that bound
are then measured again by differences in float64.  Where more than a few hundred points matter, sigma is large against
rounding: the products' own distances decide, in float32 or float64 as their accuracy requires.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from logsnr.projection.sets import ReferenceSet

FEW = 192
"""Up to so many points per query are measured again by differences."""
SMALL = 2**17
"""Sets of so many numbers need no screening."""
EPS_ACCURACY = 5e-6
"""Relative accuracy of eps up to which float32 distances decide a softmax over many points."""


@dataclass(frozen=True)
class Softmin:
    """What a set of points says of B states, from one search.

    Attributes:
        mean: softmax mean of the points, the ideal denoiser's x0 `[B, *shape]`.
        index: the nearest point `[B]`; where several tie, one of them.
        squared: squared distance to it `[B]`.
        log_sum: log of sum exp(-(d^2 - squared) / (2 sigma^2)) over all points `[B]`: 0 where one point decides.
    """

    mean: Tensor
    index: Tensor
    squared: Tensor
    log_sum: Tensor


class Points(ReferenceSet):
    """A finite set.

    The first search of a large set stores its centred float32 copy beside it, which the screening needs.

    Args:
        points: `[M, *shape]`, kept as they are (not copied).
        chunk: points per step where distances come from differences alone (small sets, and states that require
            gradients); None for what keeps a step near 64 MB.

    Raises:
        ValueError: if there are no points, or `chunk` is not positive.
    """

    def __init__(self, points: Tensor, chunk: int | None = None) -> None:
        if points.ndim < 2 or points.numel() == 0:
            raise ValueError(f"points have shape {tuple(points.shape)}: give [M, *shape] with M >= 1 points")
        if not points.is_floating_point():
            raise ValueError(f"points have dtype {points.dtype}: give floats in the units of x, as the codec encodes")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk = {chunk}: must be at least 1, or None")
        self.points = points
        self.chunk = chunk
        self.shape = tuple(points.shape[1:])
        self._flat = points.detach().flatten(1)
        self._screen: _Screen | None = None

    def __len__(self) -> int:
        return len(self.points)

    def project(self, y: Tensor) -> Tensor:
        return self.points[self.nearest(y).index].to(y.dtype)

    def distance(self, y: Tensor) -> Tensor:
        return self.nearest(y).squared.sqrt()

    def nearest(self, y: Tensor) -> Softmin:
        """The search at sigma 0, where the softmax is the nearest point (the mean of those that tie)."""
        return self.softmin(y, 0.0)

    def smoothed_squared_distance(self, y: Tensor, sigma: float | Tensor) -> Tensor:
        """dist_K^2(y, sigma) `[B]`, differentiable in y; from below dist_K^2 by at most 2 sigma^2 log M."""
        found = self.softmin(y, sigma)
        return found.squared - 2 * _levels(sigma, found.squared).squeeze(1).square() * found.log_sum

    def softmin(self, y: Tensor, sigma: float | Tensor, *, precise: bool | None = None) -> Softmin:
        """Softmax over the points at weights exp(-||y - x||^2 / (2 sigma^2)).

        A state that is not finite gets nan, whatever the others are.

        Args:
            y: states x + sigma eps `[B, *shape]`; the answers come in their dtype.
            sigma: noise levels >= 0, one float or `[B]`.
            precise: True for float64 accuracy; False for 1e-5 in eps, what float32 states can use; None for what the
                dtype of y asks for.

        Raises:
            ValueError: if y or sigma does not fit, or a sigma is negative or not finite.
        """
        flat = self._check(y).flatten(1).to(_wide(y))
        levels = _levels(sigma, flat)
        if self._flat.numel() <= SMALL or (torch.is_grad_enabled() and y.requires_grad):
            found = self._by_differences(flat, levels)
        else:
            found = self._by_screening(flat, levels, y.dtype == torch.float64 if precise is None else precise)
        mean, index, squared, log_sum = found
        return Softmin(mean.to(y.dtype).view_as(y), index, squared.to(y.dtype), log_sum.to(y.dtype))

    def _by_differences(self, y: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Every distance from differences, streamed with the nearest so far as running reference; differentiable."""
        nearest = torch.full_like(y[:, :1], math.inf)
        index = torch.zeros(len(y), dtype=torch.long, device=y.device)
        total, mean = torch.zeros_like(nearest), torch.zeros_like(y)
        for first, points in self._chunks(self.chunk or max(1, 2**23 // (len(y) + y.shape[1])), y):
            d2 = torch.cdist(y, points, compute_mode="donot_use_mm_for_euclid_dist").square()
            least, where = d2.min(1, keepdim=True)
            index = torch.where(least < nearest, where + first, index.unsqueeze(1)).squeeze(1)
            closest = torch.minimum(nearest, least)
            weight, keep = _weight(d2 - closest, sigma), _weight(nearest - closest, sigma)
            total = keep * total + weight.sum(1, keepdim=True)
            mean = keep * mean + weight @ points
            nearest = closest
        return mean / total, index, nearest.squeeze(1), total.log().squeeze(1)

    @torch.no_grad()
    def _by_screening(self, y: Tensor, sigma: Tensor, precise: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self._screen is None:
            self._screen = _Screen.of(self._flat, _wide(y))
        finite = y.isfinite().all(1, keepdim=True)
        y = torch.where(finite, y, 0)
        block = max(1, 2**23 // len(self))
        parts = [
            self._search(y[i : i + block], sigma[i : i + block], self._screen, precise) for i in range(0, len(y), block)
        ]
        mean, index, squared, log_sum = (torch.cat(part) for part in zip(*parts, strict=True))
        lost = torch.where(finite, 0.0, math.nan).to(y)
        return mean + lost, index, squared + lost.squeeze(1), log_sum + lost.squeeze(1)

    def _search(
        self, y: Tensor, sigma: Tensor, screen: _Screen, precise: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Screening, then differences for the points that matter."""
        offset = y - screen.centre
        length = offset.norm(dim=1, keepdim=True)
        score, slack = screen.score(offset), screen.slack(length)
        margin = math.log(len(self)) + (38 if precise else 20) + (screen.radius / sigma.clamp(min=1e-30)).log().clamp(0)
        # Beyond it, all points together weigh less than rounding.
        reach = score.amin(1, keepdim=True) + slack + 2 * sigma * sigma * margin
        inside = score <= reach.float()
        crowd = (inside.sum(1) > FEW).nonzero().squeeze(1)
        heavy, ranked = crowd, None
        if len(crowd):
            states = _States(offset[crowd], length[crowd], sigma[crowd], slack[crowd])
            ranked = self._rank(score[crowd], states, screen, precise)
            heavy = crowd[ranked.heavy]
            inside[crowd] = torch.zeros_like(inside[crowd]).scatter_(1, ranked.top, True)
        row, column = inside.nonzero(as_tuple=True)
        d2 = torch.cat([(y[r] - p).square().sum(1) for r, p in self._pairs(row, column, y)])
        squared = y.new_full((len(y),), math.inf).scatter_reduce(0, row, d2, "amin")
        first = torch.where(d2 == squared[row], column, len(self))
        index = torch.full((len(y),), len(self), device=y.device).scatter_reduce(0, row, first, "amin")
        weight = _weight(d2 - squared[row], sigma[row, 0])
        total = torch.zeros_like(squared).index_add_(0, row, weight)
        mean = torch.zeros_like(y)
        keep = weight > 1e-20
        if ranked is not None and len(heavy):
            here = torch.zeros_like(total, dtype=torch.bool).index_fill_(0, heavy, True)[row]
            keep &= ~here
            excess = squared[heavy, None] - length[heavy].square() - ranked.least
            shift = torch.exp(-excess * (0.5 / sigma[heavy].square()))  # from the nearest to `ranked.least`
            share = ranked.share.scatter_(
                1, ranked.top[ranked.heavy], (weight[here].view(-1, FEW) * shift).to(ranked.share)
            )
            sums = share.sum(1, keepdim=True)
            total[heavy] = (sums / shift).squeeze(1)
            mean[heavy] = self._average(share.div_(sums), y)
        row, column, weight = row[keep], column[keep], weight[keep] / total[row[keep]]
        done = 0
        for r, p in self._pairs(row, column, y):
            mean.index_add_(0, r, p * weight[done : done + len(r), None])
            done += len(r)
        return mean, index, squared, total.log()

    def _rank(self, score: Tensor, states: _States, screen: _Screen, precise: bool) -> _Ranked:
        """For states near more than `FEW` points: better scores where needed, the best points, and who needs the rest.

        The best points are measured by differences; rounding of the other scores moves x0 in proportion to their
        share of the weight, which decides whether float32 scores do, or float64 ones are formed, or none are needed.
        """
        offset, length, sigma, slack = states
        rough = torch.full_like(score[:, 0], precise, dtype=torch.bool)
        rate = 0.5 / sigma.square()
        while True:
            if bool(rough.any()):
                score = score.to(offset)
                score[rough] = torch.cat(
                    [(offset[rough] @ p.T).mul_(-2).add_(q) for _, p, q in self._centred(offset)], 1
                )
            values, top = score.topk(FEW, largest=False)
            least = values[:, :1]
            share = (least - score).mul_(rate.to(score)).exp_()
            best = share.gather(1, top).sum(1, keepdim=True)
            others = share.scatter_(1, top, 0).sum(1, keepdim=True)  # `_search` puts the measured weights there
            rest = (others / (best + others)).to(offset)
            if bool(rough.any()):
                break
            rest = rest * (slack * rate).clamp(max=60).exp()  # rounding may have shrunk it by that much
            rough = (screen.drift(length, sigma) * rest > EPS_ACCURACY).squeeze(1)
            rough |= values[:, -1] <= (least + slack).squeeze(1)
            if not bool(rough.any()):
                break
        visible = 1e-15 if precise else EPS_ACCURACY / 50
        heavy = (rest * screen.radius > visible * sigma * math.sqrt(offset.shape[1])).squeeze(1)
        share = share[heavy] if precise else share[heavy].float()
        return _Ranked(top.sort(1).values, heavy, share, least[heavy].to(offset))

    def _average(self, share: Tensor, like: Tensor) -> Tensor:
        """sum_i share_i p_i over all points, in the precision of the shares."""
        screen = self._screen
        assert screen is not None
        if share.dtype == torch.float32:
            return screen.centre + (share @ screen.points).to(like)
        mean = screen.centre.expand(len(share), -1)
        for first, p, _ in self._centred(like):
            mean = mean + share[:, first : first + len(p)] @ p
        return mean

    def _chunks(self, size: int, like: Tensor) -> Iterator[tuple[int, Tensor]]:
        for first in range(0, len(self), size):
            yield first, self._flat[first : first + size].to(like)

    def _centred(self, like: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Chunks of points minus the centre and their squared norms, in the dtype of the queries."""
        assert self._screen is not None
        for first, points in self._chunks(max(1, 2**23 // self._flat.shape[1]), like):
            centred = points - self._screen.centre
            yield first, centred, centred.square().sum(1)

    def _pairs(self, row: Tensor, column: Tensor, like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of (rows, their points) for pairs; one empty block if there are none."""
        size = max(1, 2**21 // self._flat.shape[1])
        for i in range(0, max(len(row), 1), size):
            yield row[i : i + size], self._flat[column[i : i + size]].to(like)


class _States(NamedTuple):
    """Queries minus the centre `[B, D]`, their norms, noise levels and screening bounds `[B, 1]`."""

    offset: Tensor
    length: Tensor
    sigma: Tensor
    slack: Tensor


class _Ranked(NamedTuple):
    """Of states near many points: the best points `[B, FEW]` by index, and which states need the others too `[B]`.

    Of these: all weights exp(-(score - least) / (2 sigma^2)), and the score they are relative to.
    """

    top: Tensor
    heavy: Tensor
    share: Tensor
    least: Tensor


@dataclass(frozen=True)
class _Screen:
    """What the screening of a set needs: the centred float32 copy, its squared norms, and its rounding bounds."""

    centre: Tensor
    points: Tensor
    squares: Tensor
    radius: float

    @classmethod
    def of(cls, flat: Tensor, wide: torch.dtype) -> _Screen:
        size = max(1, 2**23 // flat.shape[1])
        sums = [flat[i : i + size].to(wide).sum(0) for i in range(0, len(flat), size)]
        centre = (torch.stack(sums).sum(0) / len(flat)).float().to(wide)
        points = torch.empty(flat.shape, dtype=torch.float32, device=flat.device)
        squares = torch.empty(len(flat), dtype=torch.float32, device=flat.device)
        for i in range(0, len(flat), size):
            points[i : i + size] = flat[i : i + size].to(wide) - centre
            squares[i : i + size] = points[i : i + size].to(wide).square().sum(1)
        return cls(centre, points, squares, math.sqrt(float(squares.max())))

    def score(self, offset: Tensor) -> Tensor:
        """||p||^2 - 2 y.p `[B, M]` of centred float32 values: squared distances, up to ||y||^2."""
        return torch.addmm(self.squares, offset.float(), self.points.T, alpha=-2)

    def slack(self, length: Tensor) -> Tensor:
        """Worst-case error of the difference of two scores, in any order of summation `[B, 1]`.

        gamma_D = D u / (1 - D u) for the product, and u each for the rounding of y, p, ||p||^2, the sum and the limit.
        """
        u = _roundoff()
        n = (self.points.shape[1] + 8) * u
        if n >= 1:
            return torch.full_like(length, math.inf)
        return 2 * (2 * n / (1 - n) * length * self.radius + 8 * u * self.radius**2)

    def drift(self, length: Tensor, sigma: Tensor) -> Tensor:
        """How far, relative to eps, x0 moves by the rounding of scores, if it moves every weight the same way `[B, 1]`.

        The rounding of a product of centred values is a random walk of about u |y| |p| / 5 (Higham and Mary, SIAM J.
        Sci. Comput. 42(5), 2020, on data of mean zero; tests measure it), where the worst case is D u |y| |p|.  Taken
        here: u |y| |p|, hence 2 u |y| |p| / (2 sigma^2) in a log-weight, and 4 times that, times |p|, in x0.
        """
        spread = float(self.squares.mean())
        return 4 * _roundoff() * length * spread / (sigma**3 * math.sqrt(self.points.shape[1]))


def _levels(sigma: float | Tensor, like: Tensor) -> Tensor:
    """Noise levels as `[B, 1]` (a float: one value seen B times), in the dtype of `like`."""
    levels = torch.as_tensor(sigma, dtype=like.dtype, device=like.device)
    if levels.numel() != 1 and levels.shape != like.shape[:1]:
        raise ValueError(
            f"sigma of shape {tuple(levels.shape)} for {len(like)} states: give one value or one per state"
        )
    if not bool((levels >= 0).all()) or bool(levels.isinf().any()):
        worst = levels.flatten()[~((levels.flatten() >= 0) & levels.flatten().isfinite())][0]
        raise ValueError(f"sigma = {float(worst)}: distances need it in [0, inf)")
    return levels.reshape(-1, 1).expand(len(like), 1)


def _weight(excess: Tensor, sigma: Tensor) -> Tensor:
    """exp(-excess / (2 sigma^2)) for excess >= 0, with 1 at excess 0 whatever sigma."""
    return torch.exp(-torch.where(excess > 0, excess * (0.5 / (sigma * sigma)), torch.zeros_like(excess)))


def _wide(like: Tensor) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def _roundoff() -> float:
    """Unit roundoff of a float32 matrix product: of TF32 or bfloat16 where PyTorch is allowed to use them."""
    return {"highest": 2.0**-24, "high": 2.0**-11}.get(torch.get_float32_matmul_precision(), 2.0**-8)
