"""The teacher: where the exact trajectories of noises end, found in many steps.

UniPC-3 on geometric levels, ended by a plain denoise: one evaluation a step, where Heun takes two.  How exact it is,
half as many steps from the same noise say.
"""

from __future__ import annotations

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser
from logsnr.errors import LogsnrError
from logsnr.sampling.batches import Cond
from logsnr.sampling.grids import log_linear
from logsnr.sampling.loop import Callback, sample
from logsnr.sampling.multistep import unipc
from logsnr.sampling.plan import Grid, Plan

NAME = "UniPC-3, log-linear"


def teacher_plan(steps: int, low: float, high: float) -> Plan:
    """The teacher's plan of that many evaluations, between two noise levels."""
    return teacher_on(log_linear(steps, high, low))


def teacher_on(grid: Grid) -> Plan:
    """The teacher's plan on levels of one's own."""
    return unipc(grid, 3)


@torch.no_grad()
def teacher_ends(
    denoiser: Denoiser,
    plan: Plan,
    noise: Tensor,
    cond: Cond | None = None,
    *,
    chunk: int | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Ends of the trajectories of a teacher's plan from `noise`, `[N, *shape]`.

    Raises:
        LogsnrError: if one is not finite.
    """
    ends = sample(denoiser, plan, noise=noise, cond=cond, chunk=chunk, callback=callback, check=False)
    return finite_ends(ends, plan)


def finite_ends(ends: Tensor, plan: Plan) -> Tensor:
    """The ends, or what comes of them, if all is finite.

    Raises:
        LogsnrError: if not.
    """
    if not bool(ends.isfinite().all()):
        raise LogsnrError(
            "the teacher's trajectory has values that are not finite: the model answers with nan or inf on sigma "
            f"{plan.sigmas[0]:.4g} ... {plan.sigmas[-2]:.4g}; run it in float32, sample on a narrower range, or check "
            "its weights"
        )
    return ends
