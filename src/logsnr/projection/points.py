"""Finite sets: exact nearest neighbours and softmax means among up to 60,000 points of 3,072 numbers.

A finite set is searched exactly, in two passes.  Scores from low-precision matrix products know every squared distance
to within a worst-case rounding bound (`screen`); the points whose weight could matter within that bound are then
measured again by differences in float64.  Where more than a few hundred points matter, sigma is large against rounding:
as few of the best are measured as accuracy asks for, and the scores decide about the others (`crowd`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from logsnr.projection.crowd import EPS_ACCURACY, FEW, rank
from logsnr.projection.screen import BLOCK, Screen
from logsnr.projection.sets import ReferenceSet

SMALL = 2**17
"""Sets of so many numbers need no screening."""


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

    The first search of a large set prepares its screening: a few seconds for 50,000 x 3,072 numbers, and 4 to 5 bytes
    per number beside the points from then on.

    Args:
        points: `[M, *shape]`, kept as they are (not copied).
        chunk: points per step where distances come from differences alone (small sets, and states that require
            gradients); None for what keeps a step near 2 MB.

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
        self._screen: Screen | None = None

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

    def _by_differences(
        self, y: Tensor, sigma: Tensor, chosen: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Distances from differences, to all or the chosen points, streamed with the nearest so far as reference.

        Differentiable; every distance is good to the last digit.
        """
        nearest = torch.full_like(y[:, :1], math.inf)
        index = torch.zeros(len(y), dtype=torch.long, device=y.device)
        total, mean = torch.zeros_like(nearest), torch.zeros_like(y)
        for first, points in self._chunks(self.chunk or max(1, BLOCK // (len(y) + y.shape[1])), y, chosen):
            d2 = torch.cdist(y, points, compute_mode="donot_use_mm_for_euclid_dist").square()
            least, where = d2.min(1, keepdim=True)
            index = torch.where(least < nearest, where + first, index.unsqueeze(1)).squeeze(1)
            closest = torch.minimum(nearest, least)
            weight, keep = _weight(d2 - closest, sigma), _weight(nearest - closest, sigma)
            total = keep * total + weight.sum(1, keepdim=True)
            mean = keep * mean + weight @ points
            nearest = closest
        index = index if chosen is None else chosen[index]
        return mean / total, index, nearest.squeeze(1), total.log().squeeze(1)

    @torch.no_grad()
    def _by_screening(self, y: Tensor, sigma: Tensor, precise: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self._screen is None:
            self._screen = Screen.of(self._flat, _wide(y))
        finite = y.isfinite().all(1, keepdim=True)
        y = torch.where(finite, y, 0)
        block = max(1, 2**23 // len(self))
        parts = [
            self._search(y[i : i + block], sigma[i : i + block], self._screen, precise) for i in range(0, len(y), block)
        ]
        mean, index, squared, log_sum = (torch.cat(part) for part in zip(*parts, strict=True))
        lost = torch.where(finite, 0.0, math.nan).to(y)
        return mean + lost, index, squared + lost.squeeze(1), log_sum + lost.squeeze(1)

    def _search(self, y: Tensor, sigma: Tensor, screen: Screen, precise: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Screening, differences for the points that matter, and scores for a crowd that matters together."""
        probe = screen.probe(y, sigma)
        score = screen.score(probe)
        values, top = score.topk(min(FEW, len(self)), largest=False)
        margin = math.log(len(self)) + (38 if precise else 20) + (screen.radius / sigma.clamp(min=1e-30)).log().clamp(0)
        # Beyond it, all points together weigh less than rounding.
        measured = values <= values[:, :1] + screen.slack(probe) + 2 * sigma * sigma * margin
        rows = (measured.all(1) & (len(self) > FEW)).nonzero().squeeze(1)
        visible = 1e-15 if precise else EPS_ACCURACY / 50
        crowds = []
        if len(rows) and not precise:
            crowd = rank(score if len(rows) == len(y) else score[rows], rows, probe.rows(rows), screen, visible)
            crowds.append(crowd.only(crowd.settled))
            rows = rows[~crowd.settled]
        if len(rows):
            few = probe.rows(rows)
            crowds.append(rank(self._exact_scores(few.offset), rows, few, screen, visible))
        for crowd in crowds:
            top[crowd.rows], measured[crowd.rows] = crowd.top, crowd.measured
        found = [
            self._by_differences(y[i : i + 1], sigma[i : i + 1], top[i][measured[i]].sort().values)
            for i in range(len(y))
        ]
        mean, index, squared, log_sum = (torch.cat(part) for part in zip(*found, strict=True))
        for crowd in crowds:
            rows, _, _, share, least, *_ = crowd = crowd.only(crowd.heavy)
            excess = squared[rows, None] - probe.offset[rows].square().sum(1, keepdim=True) - least
            shift = torch.exp(-excess * (0.5 / sigma[rows].square()))  # from the nearest to `least`
            near = log_sum[rows, None].exp() * shift
            total = near + share.sum(1, keepdim=True)
            mean[rows] = (near * mean[rows] + self._sum(share, screen)) / total
            log_sum[rows] = (total / shift).log().squeeze(1)
        return mean, index, squared, log_sum

    def _exact_scores(self, offset: Tensor) -> Tensor:
        """||p||^2 - 2 o.p `[B, M]` in the dtype of the states."""
        return torch.cat([(offset @ p.T).mul_(-2).add_(p.square().sum(1)) for _, p in self._centred(offset)], 1)

    def _sum(self, share: Tensor, screen: Screen) -> Tensor:
        """sum_i share_i p_i over all points, in the precision of the shares."""
        if share.dtype == torch.float32:
            return screen.sum(share)
        total = share.sum(1, keepdim=True) * screen.centre
        for first, p in self._centred(share):
            total += share[:, first : first + len(p)] @ p
        return total

    def _chunks(self, size: int, like: Tensor, chosen: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        for first in range(0, len(self) if chosen is None else len(chosen), size):
            part = slice(first, first + size)
            yield first, self._flat[part if chosen is None else chosen[part]].to(like)

    def _centred(self, like: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Chunks of points minus the centre, in the dtype of the states."""
        assert self._screen is not None
        for first, points in self._chunks(max(1, BLOCK // self._flat.shape[1]), like):
            yield first, points - self._screen.centre


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
