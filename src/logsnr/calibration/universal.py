"""Universal plans: one plan for every model, fitted over several.

In units of sigma_data every model's data has variance 1, and eps and x0 rows do not change with the unit: a plan of
relative levels sigma/sigma_data is a plan for all of them, but for its first level, which is each model's own largest
(sampling/universal.py).  The other numbers minimise the geometric mean over models of the
end-point error,

    mean_m log mse_m(p),     by one model's damped Gauss-Newton (descent.py) with J^T J -> mean_m J_m^T J_m / mse_m,

so that each model counts by the factor its error changes by, whatever its size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from logsnr.calibration.descent import Normal, Space, descend, mean_square, normal_equations
from logsnr.calibration.rollout import Batch, spread_cond
from logsnr.calibration.rows import pad
from logsnr.calibration.teacher import teacher_ends, teacher_grid
from logsnr.denoiser import Denoiser
from logsnr.errors import LogsnrError
from logsnr.sampling.plan import Plan
from logsnr.sampling.sample import start
from logsnr.sampling.universal import scaled, universal_plan

__all__ = ["Fitted", "Member", "fit_universal", "member", "relative_start", "universal_plan"]


@dataclass(frozen=True, kw_only=True)
class Member:
    """A model with the noises it is judged by.

    Attributes:
        denoiser: the model.
        fit: noises with the teacher's ends, to fit to.
        select: as many others, to choose by.
    """

    denoiser: Denoiser
    fit: Batch
    select: Batch

    def error(self, relative: Plan, batch: Batch, chunk: int = 512) -> float:
        """Mean squared end-point error of a plan of relative levels."""
        own = scaled(relative, self.denoiser.sigma_data, *self.denoiser.sampling_range)
        return mean_square(self.denoiser, own, batch, chunk, None)


@torch.no_grad()
def member(
    denoiser: Denoiser,
    *,
    cond: Mapping[str, Any] | None = None,
    batch: int = 64,
    teacher: int = 96,
    seed: int = 0,
    chunk: int = 512,
) -> Member:
    """A model with 2 `batch` noises and the ends of their exact trajectories; 2 `batch` `teacher` evaluations.

    Args:
        denoiser: the model.
        cond: conditions by keyword; rows of tensors are used in turn.
        batch: noises to fit to, and as many to select by.
        teacher: evaluations of the teacher.
        seed: of the noises.
        chunk: samples per call.
    """
    noise = start(denoiser, None, 2 * batch, torch.Generator().manual_seed(seed))
    whole = Batch(noise=noise, cond=spread_cond(cond, 0, 2 * batch), end=noise.new_empty(2 * batch, 0))
    whole = teacher_ends(denoiser, whole, teacher_grid(teacher, *denoiser.sampling_range), chunk, None)
    fit, select = whole.chunks(batch)
    return Member(denoiser=denoiser, fit=fit, select=select)


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A universal plan.

    Attributes:
        plan: levels relative to sigma_data.
        error: geometric mean over the models of the RMSE on selection noise.
    """

    plan: Plan
    error: float


def fit_universal(
    members: Sequence[Member], starts: Sequence[Plan], *, low: float, high: float, strength: float = 1.0
) -> Fitted:
    """The plan of relative levels with the least geometric mean of errors, over all members.

    Args:
        members: the models.
        starts: plans of relative levels to descend from, all of one number of steps; history and basis are theirs, and
            so stays the first level, which stands for each model's largest.
        low: smallest relative level allowed.
        high: largest, that of the starts.
        strength: of the pull towards the start, in units of one sample.

    Raises:
        LogsnrError: if there is no member or no start.
    """
    if not members or not starts:
        raise LogsnrError(f"{len(members)} models and {len(starts)} starting plans: give at least one of each")
    found = [_descended(members, plan, low, high, strength) for plan in starts]
    return min(found, key=lambda fitted: fitted.error)


@torch.no_grad()
def _descended(members: Sequence[Member], first: Plan, low: float, high: float, strength: float) -> Fitted:
    space = Space(template=first, low=low, high=high)

    def geometric(plan: Plan, purpose: str) -> float:
        errors = [m.error(plan, getattr(m, purpose)) for m in members]
        return math.exp(sum(math.log(e) for e in errors) / len(errors)) if 0 < min(errors) else 0.0

    def equations(p: torch.Tensor, scale: float) -> Normal:
        parts = []
        for m in members:
            own = Space(template=first, low=m.denoiser.sampling_range[0], high=m.denoiser.sampling_range[1])
            moved = p.clone()
            moved[1 : space.n] += math.log(m.denoiser.sigma_data)
            moved[0] = math.log(own.high)
            parts.append(normal_equations(m.denoiser, own, moved, m.fit, 512, None))
        mse = math.exp(sum(math.log(max(part.mse, 1e-300)) for part in parts) / len(parts))
        gram = sum((part.gram / part.mse for part in parts), torch.zeros(())) * (mse / len(parts))
        pull = sum((part.pull / part.mse for part in parts), torch.zeros(())) * (mse / len(parts))
        # the first level is each model's own
        gram[0], gram[:, 0], pull[0] = 0.0, 0.0, 0.0
        return Normal(gram, pull, mse)

    best = Fitted(plan=first, error=math.sqrt(geometric(first, "select")))

    def accept(plan: Plan) -> bool:
        nonlocal best
        error = math.sqrt(geometric(plan, "select"))
        if error < best.error:
            best = Fitted(plan=plan, error=error)
        return error < 1.05 * best.error

    def errors(plan: Plan) -> torch.Tensor:
        return torch.tensor([geometric(plan, "fit")], dtype=torch.float64)

    count = sum(len(m.fit) for m in members)
    descend(space, first, count, strength, equations, errors, accept, tail=math.inf)
    return best


def relative_start(sigmas: Sequence[float], gamma: float, history: int, basis: Any = "eps") -> Plan:
    """Gradient estimation on relative levels (0 is appended), every row as long as its history allows."""
    rows = [(1.0,)] + [(gamma, 1 - gamma)] * (len(sigmas) - 2) + ([(1.0,)] if len(sigmas) > 1 else [])
    if not history:
        rows = [(1.0,)] * len(sigmas)
    padded = tuple(pad(row, min(i, history) + 1) for i, row in enumerate(rows))
    return replace(Plan((*sigmas, 0.0), tuple(rows), basis), rows=padded)
