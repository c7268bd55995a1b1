"""States near many points: whose weight must be measured again, and whose score is good enough."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from logsnr.projection.screen import Probe, Screen, blocks

FEW = 1024
"""Up to so many points per state are measured by differences."""
EPS_ACCURACY = 5e-6
"""Relative accuracy of eps up to which low-precision scores decide a softmax over many points."""


class Crowd(NamedTuple):
    """Of C states `rows`: their best points, which of those to measure, and what the scores say of all the others.

    Attributes:
        rows: `[C]`, which states of the batch.
        top: the best points `[C, FEW]` by score, best first.
        measured: which of these to measure `[C, FEW]`, the first few.
        share: weights exp(-(score - least) / (2 sigma^2)) of all points `[C, M]`, 0 for the measured.
        least: the smallest score `[C, 1]`.
        heavy: whether these weights are visible in x0 `[C]`.
        settled: whether they are accurate enough `[C]`.
    """

    rows: Tensor
    top: Tensor
    measured: Tensor
    share: Tensor
    least: Tensor
    heavy: Tensor
    settled: Tensor

    def only(self, keep: Tensor) -> Crowd:
        return self if bool(keep.all()) else Crowd(*(part[keep] for part in self))


def rank(score: Tensor, rows: Tensor, probe: Probe, screen: Screen, visible: float) -> Crowd:
    """Split the points of each state into a few to be measured and the rest, which its scores `[C, M]` decide.

    Float64 scores need no doubt: all `FEW` best are measured.  Of float32 ones just so many that the rounding of the
    rest moves x0 by less than `EPS_ACCURACY` sigma sqrt(D); where `FEW` do not suffice, the state is not settled.

    Args:
        score: overwritten.
        visible: relative size of eps below which the rest is left out.
    """
    values, top = score.topk(FEW, largest=False)
    least = values[:, :1]
    unit = probe.sigma * math.sqrt(probe.offset.shape[1])  # the size of sigma eps
    share = score.sub_(least).mul_((-0.5 / probe.sigma.square()).to(score)).exp_()
    best = share.gather(1, top)
    if score.dtype == torch.float64:
        measured = torch.ones_like(top, dtype=torch.bool)
        settled = measured[:, 0]
    else:
        share.scatter_(1, top, 0)
        each, common = screen.doubt(probe)
        limit = (EPS_ACCURACY * unit * (best.sum(1) + share.sum(1))[:, None]).square()
        # Where rounding may be large against 1, the rest may also weigh more than it seems.
        limit /= (6 * screen.noise(probe) * screen.reach).clamp(max=80).exp()
        squared = sum(share[:, part].square() @ screen.risks[part] for part in blocks(share.shape[1], len(share)))
        others = (squared * each).sum(1, keepdim=True)
        own = best.square() * (screen.risks[top] * each[:, None]).sum(2)
        after = share.sum(1, keepdim=True)
        unknown = others + _from_here(own) + common * (after + _from_here(best)).square()
        near = values <= least + screen.slack(probe)  # any of them may be the nearest
        measured = near | (unknown > limit)
        settled = ~near[:, -1] & (others + common * after.square() <= limit).squeeze(1)
    share.scatter_(1, top, torch.where(measured, 0, best))
    rest = share.sum(1, keepdim=True)
    heavy = rest / (rest + (best * measured).sum(1, keepdim=True)) * screen.radius > visible * unit
    return Crowd(rows, top, measured, share, least.to(probe.offset), heavy.squeeze(1), settled)


def _from_here(values: Tensor) -> Tensor:
    """Sums of each entry and all behind it, along the last axis."""
    return values.flip(1).cumsum(1).flip(1)
