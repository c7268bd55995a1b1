"""Recorded runs: every state of a plan, and what the denoiser said of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser
from logsnr.sampling.default import plan_for
from logsnr.sampling.loop import Step, sample
from logsnr.sampling.plan import Grid, Plan


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """A run of a plan of n evaluations on B samples.

    Attributes:
        plan: what was run.
        z: canonical states `[n + 1, B, *shape]`, from the noise to the end.
        x0: the denoiser's estimates of the sample `[n, B, *shape]`, at all states but the last.
    """

    plan: Plan
    z: Tensor
    x0: Tensor

    @property
    def sigmas(self) -> Grid:
        """Noise levels of the n + 1 states."""
        return self.plan.sigmas

    @property
    def x(self) -> Tensor:
        """Where it ends, what `sample` returns `[B, *shape]`."""
        return self.z[-1]

    def __repr__(self) -> str:
        n, batch, *shape = self.z.shape
        return f"Trajectory({batch} samples {tuple(shape)}, {n} states, {self.plan!r})"


def trajectory(denoiser: Denoiser, plan: Plan | int, **options: Any) -> Trajectory:
    """`sample`, remembered: every state and every estimate of x0.

        seen = trajectory(denoiser, 10, n=4, generator=torch.Generator().manual_seed(0))

    Args:
        denoiser: the model.
        plan: as in `sample`.
        **options: those of `sample`.

    Raises:
        ValueError: as `sample`.
        NonFiniteError: as `sample`.
    """
    plan = plan if isinstance(plan, Plan) else plan_for(denoiser, plan)
    also = options.pop("callback", None)
    states: list[Tensor] = []
    estimates: list[Tensor] = []

    def note(step: Step) -> None:
        states.append(step.z)
        if step.estimate is not None:
            estimates.append(step.estimate.x0.to(step.z))
        if also is not None:
            also(step)

    sample(denoiser, plan, callback=note, **options)
    return Trajectory(plan=plan, z=torch.stack(states), x0=torch.stack(estimates))
