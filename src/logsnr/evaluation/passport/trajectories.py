"""Trajectories: what sampling makes of the model: where few steps end, how paths bend, what errors they carry.

The teacher (sampling/teacher.py) runs from the same noise; half as many steps say how exact it is.  Curvature
is the change of direction per unit of log noise level, RMS over samples and dimensions,

    kappa(sigma) = ||d eps / d ln sigma|| / sqrt(D)      along the teacher's trajectory: 0 where one step is enough
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from logsnr.evaluation.gamma import error_covariance
from logsnr.evaluation.passport.card import Bend, EndPoint, Gamma
from logsnr.evaluation.passport.meter import Meter
from logsnr.sampling import Step, grids, sample, solvers
from logsnr.sampling.batches import Cond, take
from logsnr.sampling.counted import rmse
from logsnr.sampling.names import named_plan
from logsnr.sampling.teacher import teacher_plan

TEACHER = 80
"""Steps of the teacher."""
NFES = (4, 6, 8, 10, 14, 20)
STUDENTS = {"GE (gamma 2)": "GE(2)", "UniPC": "UniPC-2"}
"""Solvers of few steps, as a passport and as `sampling.names` call them."""
STRIDE = 4
"""Steps of the teacher between two readings of the direction, for its curvature: closer ones are a network's jitter."""
GAMMA_STEPS = 10
DRAW_STEPS = 24
"""Steps that draw clean samples from a model without data."""


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """What was measured along trajectories; empty where the ends are not finite.

    Attributes:
        ends: the teacher's samples `[K, *shape]`, the finite ones.
        lost: trajectories that ended with nan or inf.
        teacher_error: RMSE against a teacher of half the steps, over sigma_data.
        bends: curvature along the teacher's trajectories.
        gammas: gamma* of DDIM's steps towards the teacher's ends.
        end_points: few-step errors, over sigma_data.
    """

    ends: Tensor
    lost: int
    teacher_error: float
    bends: tuple[Bend, ...]
    gammas: tuple[Gamma, ...]
    end_points: tuple[EndPoint, ...]

    @classmethod
    def none(cls, ends: Tensor, lost: int = 0) -> Trajectories:
        """Where nothing can be said: of too few ends, or of none."""
        return cls(ends=ends, lost=lost, teacher_error=math.nan, bends=(), gammas=(), end_points=())


def draw(denoiser: Meter, noise: Tensor, cond: Cond, chunk: int) -> Tensor:
    """Samples of the model from noise, with `DRAW_STEPS` steps."""
    low, high = denoiser.sampling_range
    return sample(denoiser, teacher_plan(DRAW_STEPS, low, high), noise=noise, cond=cond, chunk=chunk, check=False)


@torch.no_grad()
def follow(denoiser: Meter, noise: Tensor, cond: Cond, chunk: int) -> Trajectories:
    """Everything along trajectories from `noise`, over the model's declared range."""
    low, high = denoiser.sampling_range
    run = partial(sample, denoiser, chunk=chunk, check=False)
    denoiser.part = "teacher"
    bends = _Bends()
    ends = run(teacher_plan(TEACHER, low, high), noise=noise, cond=cond, callback=bends.see)
    finite = ends.flatten(1).isfinite().all(1)
    lost = int((~finite).sum())
    if int(finite.sum()) < 2:
        return Trajectories.none(ends[finite], lost)
    noise, ends = noise[finite], ends[finite]
    cond = take(cond, finite)
    scale = denoiser.sigma_data
    half = run(teacher_plan(TEACHER // 2, low, high), noise=noise, cond=cond)
    denoiser.part = "few steps"
    points = [
        EndPoint(
            solver=name,
            nfe=n,
            rmse=rmse(run(named_plan(solver, n, low, high), noise=noise, cond=cond), ends) / scale,
        )
        for name, solver in STUDENTS.items()
        for n in NFES
    ]
    denoiser.part = "gamma"
    ddim = solvers.ddim(grids.log_linear(GAMMA_STEPS, high, low, last="min"))
    steps = error_covariance(denoiser, ends, ddim, noise=noise, chunk=chunk, cond=cond)
    return Trajectories(
        ends=ends,
        lost=lost,
        teacher_error=rmse(half, ends) / scale,
        bends=bends.found() if not lost else (),
        gammas=tuple(Gamma(sigma=step.sigma, gamma=step.gamma) for step in steps),
        end_points=tuple(points),
    )


class _Bends:
    """Sums of squared changes of eps between every fourth level of a plan, over all samples."""

    def __init__(self) -> None:
        self.before: Tensor | None = None
        self.sums: dict[int, tuple[float, int]] = {}
        self.sigmas: list[float] = []

    def see(self, step: Step) -> None:
        """A callback of `sample`."""
        if step.estimate is None or step.index % STRIDE:
            return
        eps = step.estimate.eps.double()
        if step.index == 0:
            self.before = None
            self.sigmas = []
        if self.before is not None:
            total, count = self.sums.get(step.index, (0.0, 0))
            change = float((eps - self.before).square().sum())
            self.sums[step.index] = (total + change, count + eps.numel())
        self.before = eps
        self.sigmas.append(step.sigma)

    def found(self) -> tuple[Bend, ...]:
        """Curvature at the geometric middle between readings."""
        out = []
        for i, (a, b) in enumerate(pairwise(self.sigmas), start=1):
            total, count = self.sums[i * STRIDE]
            out.append(Bend(sigma=math.sqrt(a * b), curvature=math.sqrt(total / count) / math.log(a / b)))
        return tuple(out)
