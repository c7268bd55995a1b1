"""The arithmetic of a plan's steps, multiplied out for a model.

    state' = A state + B F + sum_{j>=1} C_j e_{i-j} + N w,        e_i = P state + Q F

with F the network's output and e_i the estimate in the plan's basis, over the larger of |P| and |Q|, so that one
addition makes it.  A, B, C, N, P and Q are host floats: `sample`'s update, the prediction's row and the state's scale
multiplied out in float64.  A step is a few fused multiply-adds and reads nothing back from the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from logsnr.adapters.diffusers.config import Noising
from logsnr.noise import alpha_s
from logsnr.sampling.loop import updates
from logsnr.sampling.plan import Basis, Plan


@dataclass(frozen=True)
class Arithmetic:
    """One step as host floats, and what a changed x0 needs: the step in terms of z, x0 and eps."""

    state: float
    output: float
    terms: tuple[tuple[int, float], ...]  # (position in the history, C)
    noise: float
    store: tuple[float, float] | None  # (P, Q) over the larger of both, where a later step reads this estimate
    basis: Basis
    keep: float  # weight of the state alpha x0 + s eps, itself in z
    gain: float  # weight of this estimate, in the step's basis
    step_basis: Basis


def arithmetic_of(plan: Plan, model: Noising, limited: bool) -> list[Arithmetic]:
    """Every step of a plan, multiplied out for a model; where nothing limits x0, estimates are kept over their unit."""
    steps = updates(plan)
    units: list[float] = []
    read = {i - j for i, step in enumerate(steps) for j, w in enumerate(step.weights) if j and w != 0}
    out = []
    for i, step in enumerate(steps):
        sigma, target = plan.sigmas[i], plan.sigmas[i + 1]
        alpha, s = alpha_s(sigma)
        k, k_ = model.scale(sigma), model.scale(target)

        def row(basis: Basis, alpha: float = alpha, s: float = s, k: float = k) -> tuple[float, float]:
            needs_x0, needs_eps = basis != "eps", basis != "x0"
            x_z, x_F = model.prediction.x0_row(alpha, s) if needs_x0 else (0.0, 0.0)
            e_z, e_F = model.prediction.eps_row(alpha, s) if needs_eps else (0.0, 0.0)
            sign = -1.0 if basis == "velocity" else 1.0
            return (e_z + sign * x_z) / k, e_F + sign * x_F

        z_weight, F_weight = row(step.basis)
        kept = row(plan.basis)
        units.append(1.0 if limited else max(kept, key=abs))
        keep, gain = k_ * step.rescale * step.keep, k_ * step.rescale * step.weights[0]
        out.append(
            Arithmetic(
                state=keep / k + gain * z_weight,
                output=gain * F_weight,
                terms=tuple(
                    (j - 1, k_ * step.rescale * w * units[i - j]) for j, w in enumerate(step.weights) if j and w != 0
                ),
                noise=k_ * step.noise,
                store=(kept[0] / units[i], kept[1] / units[i]) if i in read else None,
                basis=plan.basis,
                keep=keep,
                gain=gain,
                step_basis=step.basis,
            )
        )
    return out


def combined(row: tuple[float, float], state: Tensor, output: Tensor) -> Tensor:
    """c_1 state + c_2 F in a new tensor of the state's dtype."""
    c1, c2 = row
    if c1 == 0:
        return output.to(state.dtype) * c2
    return (state * c1).add_(output, alpha=c2)


def stored(row: tuple[float, float], state: Tensor, output: Tensor, spare: Tensor | None) -> Tensor:
    """c_1 state + c_2 F, where one of both is 1: over `spare` if that fits, else in a new tensor of the state's dtype.

    New memory of megabytes costs a CPU more than the arithmetic does: its pages come one fault at a time.
    """
    c1, c2 = row
    if spare is None or not _fits(spare, state, output):
        spare = None
    if torch.promote_types(state.dtype, output.dtype) != state.dtype:
        output = output.to(state.dtype)
    if c1 == 0:
        return output.to(state.dtype, copy=True) if spare is None else spare.copy_(output)
    if c1 == 1:
        return torch.add(state, output, alpha=c2, out=spare)
    return torch.add(output, state, alpha=c1, out=spare)


def _fits(spare: Tensor, state: Tensor, output: Tensor) -> bool:
    """Whether a result like `state` may be written over `spare`: nothing differentiates or forbids it."""
    if spare.shape != state.shape or spare.dtype != state.dtype or spare.device != state.device:
        return False
    if spare.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return not (spare.requires_grad or (torch.is_grad_enabled() and (state.requires_grad or output.requires_grad)))
