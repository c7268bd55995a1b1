"""Descent: all numbers of a plan at once, against the error at the end point.

With parameters p (log sigmas, rows), residuals r(p) = x_student - x_teacher and q_i the mean square of sample i, a
Gauss-Newton step with damping solves

    (J^T W J / (N loss) + k + damping diag) d = - J^T W r / (N loss) - k (p - p_0),      k = strength / (count T^2),

where J comes from finite differences of rollouts: row i and sigma_{i+1} move z_{i+1} for nothing and cost n - 1 - i
evaluations, so a whole J costs about half as many rollouts as there are parameters, and no gradient of the network.
p_0 is the prior, T how far a parameter may stray from it, count the number of samples.

The loss is Cauchy's (rollout.py): W has 1 / (1 + q_i / c).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from logsnr.calibration.levels import MIN_STEP
from logsnr.calibration.rollout import TAIL, Metric, Noises, Rollout, residuals, tempered
from logsnr.calibration.trial import Trial, as_tensor
from logsnr.denoiser import Denoiser
from logsnr.sampling.plan import Plan

NUDGE = 4e-3
"""Of a finite difference, in a coefficient or in log sigma."""

STRAY = 0.5
"""How far a coefficient or a log sigma may be expected to lie from its prior."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """The plans that are searched: `template`'s basis and row lengths, levels within [low, high], the first fixed or
    not."""

    template: Plan
    low: float
    high: float
    first: float | None = None

    @property
    def n(self) -> int:
        return self.template.nfe

    def vector(self, plan: Plan) -> Tensor:
        """log sigma_0 ... log sigma_{n-1}, then the rows."""
        numbers = [math.log(s) for s in plan.sigmas[:-1]] + [c for row in plan.rows for c in row]
        return torch.tensor(numbers, dtype=torch.float64)

    def plan(self, p: Tensor) -> Plan:
        """The plan of a vector, its levels pushed apart to the smallest step and into the range."""
        n, values = self.n, p.tolist()
        logs = values[:n]
        end = self.template.sigmas[-1]
        low, high = math.log(self.low), math.log(self.high)
        if end > 0:
            low = max(low, math.log(end) + MIN_STEP)
        if self.first is not None:
            logs[0] = math.log(self.first)
        for i in range(n):  # from the noisy end down, leaving room below
            ceiling = high if i == 0 else logs[i - 1] - MIN_STEP
            logs[i] = max(min(logs[i], ceiling), low + (n - 1 - i) * MIN_STEP)
        rows, at = [], n
        for row in self.template.rows:
            rows.append(tuple(values[at : at + len(row)]))
            at += len(row)
        # exp(log(high)) may miss high by a rounding error: stay within
        sigmas = tuple(min(max(math.exp(v), self.low), self.high) for v in logs)
        return replace(self.template, sigmas=(*sigmas, end), rows=tuple(rows), meta={})

    def owners(self) -> list[int]:
        """For each parameter the last step whose evaluation it leaves alone (-1: none)."""
        return [i - 1 for i in range(self.n)] + [i for i, row in enumerate(self.template.rows) for _ in row]

    def cost(self) -> int:
        """Evaluations that a Jacobian takes, the rollout itself included."""
        return self.n + sum(self.n - 1 - owner for owner in self.owners())


Normal = tuple[Tensor, Tensor]
"""J^T W J and J^T W r, per residual."""


def normal_equations(
    denoiser: Denoiser,
    space: Space,
    p: Tensor,
    noises: Noises,
    chunk: int,
    metric: Metric | None,
    scale: float = math.inf,
) -> Normal:
    """Normal equations at p, by forward differences; `space.cost()` evaluations of the noises."""
    plan, owners = space.plan(p), space.owners()
    gram = torch.zeros(len(p), len(p), dtype=torch.float64)
    pull = torch.zeros(len(p), dtype=torch.float64)
    for part in noises.chunks(chunk):
        base = Rollout(denoiser, plan.basis, part)
        r = residuals(base.run(plan), part, metric)
        weight = (1 + r.square().mean(1, keepdim=True) / scale).rsqrt()
        columns = []
        for index, owner in enumerate(owners):
            moved = p.clone()
            # downwards for sigmas: the first may sit at the end of the range
            moved[index] += -NUDGE if index < space.n else NUDGE
            nudged = space.plan(moved)
            if nudged == plan:  # pinned by the range or the smallest step
                columns.append(torch.zeros_like(r).flatten())
                continue
            x = base.branch(owner).run(nudged)
            change = (residuals(x, part, metric) - r) * weight
            columns.append(change.flatten() / (-NUDGE if index < space.n else NUDGE))
        jacobian = torch.stack(columns)
        gram += (jacobian @ jacobian.T).cpu()
        pull += (jacobian @ (r * weight).flatten()).cpu()
    count = noises.end.numel()
    return gram / count, pull / count


def descend(
    space: Space,
    start: Plan,
    count: int,
    strength: float,
    equations: Callable[[Tensor, float], Normal],
    errors: Callable[[Plan], Tensor],
    accept: Callable[[Plan], bool],
    tail: float = TAIL,
) -> None:
    """Damped Gauss-Newton from `start` until `accept` says stop or no step helps.

    Args:
        space: what may move.
        start: where to begin, and the prior.
        count: number of fitting samples.
        strength: weight of the prior, in units of one sample.
        equations: `normal_equations` at a vector, for a scale.
        errors: mean square of every fitting sample under a plan `[N]`.
        accept: called with each better plan; False ends the descent.
        tail: `TAIL`; inf for the plain mean square.
    """
    prior = p = space.vector(start)
    weight = strength / count / STRAY**2
    damping = 1e-2
    while True:
        q = errors(space.plan(p))
        scale = tail * float(q.mean())
        current = tempered(q, scale) if scale > 0 else 0.0
        if current == 0 or not math.isfinite(current):
            return
        gram, pull = equations(p, scale)
        if not bool(gram.isfinite().all()):
            return
        objective = 1 + weight * float((p - prior).square().sum())
        gram, pull = gram / current, pull / current + weight * (p - prior)
        spread = gram.diagonal().clamp(min=1e-9 * float(gram.diagonal().max()))
        best = math.inf
        for _ in range(3):
            for trial in (damping, 0.1 * damping):
                system = gram + torch.diag(weight + trial * spread)
                moved = space.vector(space.plan(p - torch.linalg.solve(system, pull)))
                value = tempered(errors(space.plan(moved)), scale) / current
                value += weight * float((moved - prior).square().sum())
                if value < min(best, objective):
                    best, chosen, used = value, moved, trial
            if best < objective:
                break
            damping *= 100
        if best >= objective:
            return
        p, damping = chosen, max(used, 1e-6)
        if not accept(space.plan(p)) or best > 0.995 * objective:
            return


def descended(trial: Trial, first: Plan, strength: float) -> None:
    """Descend from a plan, and offer every plan on the way, until three in a row are worse on the selection noise."""
    low, high = trial.settings.sigma_range
    space = Space(template=first, low=low, high=high, first=trial.settings.first)
    cost = space.cost() * trial.settings.n
    how = {"from": "descent", "history": max(map(len, first.rows)) - 1, "strength": strength}
    best, worse = trial.offer(first, {"from": "start"}), 0

    def equations(p: Tensor, scale: float) -> Normal:
        def measure() -> list[Any]:
            noises, meter = trial.noises["fit"], trial.ledger.meter
            return [v.tolist() for v in normal_equations(meter, space, p, noises, trial.chunk, trial.metric, scale)]

        trial.ledger.afford(cost)  # a start that another descent began from costs nothing: what follows will
        gram, pull = trial.ledger.recall(f"normal {space.plan(p).hash}", cost, measure)[:2]
        return as_tensor(gram), as_tensor(pull)

    def accept(plan: Plan) -> bool:
        nonlocal best, worse
        trial.tell("descent")
        error = trial.offer(plan, how)
        worse = 0 if error < best else worse + 1
        best = min(best, error)
        return worse < 3

    descend(space, first, trial.settings.n, strength, equations, lambda plan: trial.squares(plan, "fit"), accept)
