"""The teacher's trajectories of the fitting noise (sampling/teacher.py), remembered on its fine grid.

Its states y = z/alpha and estimates eps at the levels of the grid are all that a search over levels needs: every
local error is an inner product of remembered tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from logsnr.calibration.rollout import Begin, Metric, Noises
from logsnr.denoiser import Denoiser
from logsnr.noise import alpha_s
from logsnr.sampling.batches import Cond
from logsnr.sampling.loop import Step
from logsnr.sampling.plan import Grid, Plan
from logsnr.sampling.reference import consistent
from logsnr.sampling.teacher import finite_ends, teacher_ends

_CACHE = 2**28
"""Numbers a cache may hold (1 GB in float32): beyond that it remembers fewer of the samples."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Trajectories at nodes of the teacher's grid.

    Attributes:
        sigmas: M decreasing noise levels, then 0.
        states: y = z/alpha at those M + 1 levels `[M + 1, K, *shape]`.
        eps: estimates at the M levels above 0 `[M, K, *shape]`.
        noises: the K samples, which say where a plan begins.
    """

    sigmas: Grid
    states: Tensor
    eps: Tensor
    noises: Noises

    def at(self, sigmas: Iterable[float]) -> list[Tensor]:
        """The teacher's canonical states z at levels of its own grid, each `[K, *shape]`."""
        where = {sigma: i for i, sigma in enumerate(self.sigmas)}
        return [self.states[where[sigma]] * alpha_s(sigma)[0] for sigma in sigmas]


def taught(
    denoiser: Denoiser,
    plan: Plan,
    noise: Tensor,
    cond: Cond | None,
    *,
    chunk: int,
    metric: Metric | None = None,
    begin: Begin | None = None,
) -> Noises:
    """Noises with the ends of their trajectories by the teacher's plan, or their features.

    Raises:
        LogsnrError: if an end is not finite.
    """
    ends = teacher_ends(denoiser, plan, noise, cond, chunk=chunk)
    return _batch(plan, noise, cond, ends, chunk, metric, begin)


def remember(
    denoiser: Denoiser,
    plan: Plan,
    noise: Tensor,
    cond: Cond | None,
    *,
    chunk: int,
    metric: Metric | None = None,
    begin: Begin | None = None,
) -> tuple[Noises, Cache]:
    """`taught`, and the trajectories of as many samples as fit into memory.

    Raises:
        LogsnrError: if a trajectory is not finite.
    """
    kept = min(len(noise), max(1, _CACHE // (2 * len(plan.sigmas) * denoiser.dim)))
    states: list[Tensor] = []
    estimates: list[Tensor] = []

    def note(step: Step) -> None:
        states.append(step.z[:kept] / alpha_s(step.sigma)[0])
        if step.estimate is not None:
            estimates.append(consistent(step.estimate).eps[:kept].to(step.z, copy=True))

    ends = teacher_ends(denoiser, plan, noise, cond, chunk=chunk, callback=note)
    noises = _batch(plan, noise, cond, ends, chunk, metric, begin)
    cache = Cache(
        sigmas=plan.sigmas,
        states=finite_ends(torch.stack(states), plan),
        eps=finite_ends(torch.stack(estimates), plan),
        noises=noises.first(kept),
    )
    return noises, cache


def _batch(
    plan: Plan,
    noise: Tensor,
    cond: Cond | None,
    ends: Tensor,
    chunk: int,
    metric: Metric | None,
    begin: Begin | None,
) -> Noises:
    if metric is not None:
        ends = finite_ends(torch.cat([metric(part) for part in torch.split(ends, chunk)]), plan)
    return Noises(noise=noise, cond=cond or {}, end=ends, begin=begin)
