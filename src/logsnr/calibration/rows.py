"""Rows by least squares: the best coefficients of each step, along the student's own rollout.

For fixed sigmas the state after step i is linear in its row c,

    z_{i+1}(c) = keep z_i + gain sum_j c_j e_{i-j},

so the row that lands nearest the teacher's state is a linear problem in a handful of unknowns,

    min_c  || z_{i+1}(c) - z*_{i+1} ||^2 / || residual of the prior row ||^2 + strength || c - c_prior ||^2,

solved in float64 from Gram matrices.  The next row is fitted from where this one lands: the rows repair each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from logsnr.calibration.rollout import Batch, Rollout
from logsnr.denoiser import Denoiser
from logsnr.noise import alpha_s
from logsnr.sampling.plan import Basis, Grid, Plan
from logsnr.sampling.sample import updates
from logsnr.sampling.solvers import ge


def prior_rows(sigmas: Grid, history: int, basis: Basis) -> Plan:
    """Gradient estimation with gamma 1.5 (gamma 1 without history), each row as long as its history, zeros beyond."""
    plan = ge(sigmas, 1.5 if history else 1.0, basis)
    return Plan(sigmas, tuple(pad(row, min(i, history) + 1) for i, row in enumerate(plan.rows)), basis)


def lengthened(plan: Plan, history: int) -> Plan:
    """The same plan, its rows with zeros up to a history."""
    return replace(plan, rows=tuple(pad(row, max(len(row), min(i, history) + 1)) for i, row in enumerate(plan.rows)))


def pad(row: Sequence[float], length: int) -> tuple[float, ...]:
    """A row with zeros up to a length."""
    return (*row, *(0.0,) * (length - len(row)))


def fit_rows(
    denoiser: Denoiser, prior: Plan, batch: Batch, targets: Sequence[Tensor], strength: float, chunk: int
) -> tuple[Plan, Tensor]:
    """The prior's levels with the rows of least squares, and where they end `[N, *shape]`; `nfe` evaluations of the
    batch.

    Args:
        denoiser: the model.
        prior: levels, row lengths, and the rows to stay near to.
        batch: noises.
        targets: the teacher's states z at `prior.sigmas[1:]`, each `[N, *shape]`.
        strength: of the pull towards the prior; 0 for none.
        chunk: samples per call of the denoiser.
    """
    runs = [Rollout(denoiser, prior.basis, part) for part in batch.chunks(chunk)]
    plan = prior
    for i, row in enumerate(prior.rows):
        gains = _gains(prior, i)
        gram = torch.zeros(len(row), len(row), dtype=torch.float64)
        pull, size = torch.zeros(len(row), dtype=torch.float64), 0.0
        for first, run in zip(range(0, len(batch), chunk), runs, strict=True):
            run.evaluate(prior.sigmas[i])
            columns = torch.stack([run.values[i - j].flatten() for j in range(len(row))]).double() * gains[1]
            rest = (targets[i][first : first + chunk] - gains[0] * run.states[i]).flatten().double()
            rest = rest - columns.T @ torch.tensor(row, dtype=torch.float64, device=columns.device)
            gram += (columns @ columns.T).cpu()
            pull += (columns @ rest).cpu()
            size += float(rest @ rest)
        if 0 < size < math.inf:
            ridge = max(strength * size, 1e-12 * float(gram.diagonal().max()))
            change = torch.linalg.solve(gram + ridge * torch.eye(len(row), dtype=torch.float64), pull)
            if bool(change.isfinite().all()):
                fitted = tuple(c + d for c, d in zip(row, change.tolist(), strict=True))
                plan = replace(plan, rows=(*plan.rows[:i], fitted, *plan.rows[i + 1 :]))
        step = updates(plan)[i]
        for run in runs:
            run.advance(step)
    return plan, torch.cat([run.states[-1] for run in runs])


def _gains(plan: Plan, i: int) -> tuple[float, float]:
    """(keep, gain) of step i in the plan's own basis, whatever its row."""
    probe = updates(replace(plan, rows=(*plan.rows[:i], (2.0,), *plan.rows[i + 1 :])))[i]
    return probe.keep, probe.weights[0] / 2


def targets_at(sigmas: Grid, cache_sigmas: Grid, states: Tensor) -> list[Tensor]:
    """The teacher's canonical states at levels of its own grid."""
    where = {sigma: i for i, sigma in enumerate(cache_sigmas)}
    return [states[where[sigma]] * alpha_s(sigma)[0] for sigma in sigmas]
