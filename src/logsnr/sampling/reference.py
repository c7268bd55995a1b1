"""Reference samplers: what plans are measured against.

Heun's method is no plan, since a step's second evaluation is not at a state of the grid:

    churn  sigma^ = sigma (1 + g),   y^ = y + S_noise sqrt(sigma^^2 - sigma^2) w        (g = 0: y^ = y)
    Euler  y* = y^ + (sigma' - sigma^) e(y^, sigma^)
    mean   y' = y^ + (sigma' - sigma^) (e(y^, sigma^) + e(y*, sigma')) / 2

`solve` integrates the trajectory itself, to a tolerance and in either direction, in the angle theta = atan(sigma):

    z = cos(theta) x0 + sin(theta) eps,    dz/dtheta = cos(theta) eps - sin(theta) x0 = v

where both ends, sigma 0 and sigma inf, are ordinary points: at high noise and near a data point z turns at a constant
rate, and log sigma would spend steps on what does not happen there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser, Estimate
from logsnr.noise import alpha_s
from logsnr.sampling.loop import Callback, Step
from logsnr.sampling.plan import check_sigmas
from logsnr.sampling.start import GENERATOR, Generators, check_range, check_start, conditions_of, randn, start


@dataclass(frozen=True, kw_only=True)
class Churn:
    """EDM's stochastic churn (2206.00364, alg. 2): noise added before a step, which the step then removes.

    Each step at a sigma in [s_min, s_max] goes up to sigma (1 + g) first, g = min(s_churn / n, sqrt(2) - 1) on a grid
    of n steps.  EDM's CIFAR-10 values are 30, .01, 1, 1.007; for ImageNet-64 they are 40, .05, 50, 1.003.

    Args:
        s_churn: amount, over the whole run; 0 is deterministic.
        s_min: smallest sigma that is churned.
        s_max: largest.
        s_noise: standard deviation of the noise, slightly above 1 to make up for lost detail.

    Raises:
        ValueError: if a value leaves its range.
    """

    s_churn: float
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.s_churn < math.inf:
            raise ValueError(f"s_churn = {self.s_churn}: must be in [0, inf); 0 is deterministic, EDM uses 5 to 80")
        if not 0 <= self.s_min <= self.s_max:
            raise ValueError(f"s_min = {self.s_min}, s_max = {self.s_max}: needs 0 <= s_min <= s_max")
        if not 0 <= self.s_noise < math.inf:
            raise ValueError(f"s_noise = {self.s_noise}: must be in [0, inf); EDM uses 1 to 1.007")

    def raised(self, sigma: float, steps: int) -> float:
        """The level sigma^ that a step from `sigma` on a grid of `steps` steps starts at."""
        if not self.s_min <= sigma <= self.s_max:
            return sigma
        return sigma * (1 + min(self.s_churn / steps, math.sqrt(2) - 1))


EDMS_CHURN = Churn(s_churn=40.0, s_min=0.05, s_max=50.0, s_noise=1.003)
"""EDM's, for ImageNet-64 (2206.00364, table 5)."""


@torch.no_grad()
def heun(
    denoiser: Denoiser,
    grid: Sequence[float],
    *,
    churn: Churn | None = None,
    noise: Tensor | None = None,
    n: int | None = None,
    generator: Generators | None = None,
    cond: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """EDM's second-order sampler (2206.00364, alg. 1; with `churn` alg. 2), in y = z/alpha.

    A grid of n steps costs 2n evaluations, or 2n - 1 when it ends at sigma 0, whose step is the plain denoise.

    Args:
        denoiser: the model.
        grid: n + 1 decreasing, finite sigmas.
        churn: None for the deterministic sampler.
        noise: starting state z `[B, *shape]` at `grid[0]`; or
        n: how many to draw.
        generator: source of the draws of `n` and of `churn`; one, or one per sample.
        cond: conditions, passed on to the denoiser by keyword.
        callback: called n + 1 times, with the state and estimate of each step's first evaluation (churned levels, where
            there is churn) and with the end.

    Returns:
        The canonical state z at the last sigma `[B, *shape]`: the sample x itself when that is 0.

    Raises:
        ValueError: if the grid starts at inf or does not decrease, the start does not fit, churn has no generator, or
            the denoiser moves the state (CFG++).
    """
    sigmas = check_sigmas(grid)
    if math.isinf(sigmas[0]):
        raise ValueError("the grid starts at sigma = inf, where y = z/alpha is undefined: choose a finite sigma_max")
    if churn is not None and churn.s_churn > 0 and generator is None:
        raise ValueError(f"churn draws noise: {GENERATOR}")
    steps = len(sigmas) - 1
    raised = [sigma if churn is None else churn.raised(sigma, steps) for sigma in sigmas[:-1]]
    check_range(denoiser, [*raised, *(sigma for sigma in sigmas[1:] if sigma > 0)])
    z = start(denoiser, noise, n, generator)
    conditions = conditions_of(denoiser, cond, len(z))
    for i, ((sigma, target), high) in enumerate(zip(pairwise(sigmas), raised, strict=True)):
        alpha, _ = alpha_s(high)
        if churn is not None and high > sigma:
            amount = churn.s_noise * alpha * math.sqrt((high - sigma) * (high + sigma))
            z = (z * (alpha / alpha_s(sigma)[0])).add_(randn(z, generator), alpha=amount)
        first = consistent(denoiser(z, high, **conditions))
        if callback is not None:
            callback(Step(i, high, z, first))
        if target == 0:
            z = first.x0.to(z)
            continue
        alpha_, _ = alpha_s(target)
        kept, gain = z * (alpha_ / alpha), alpha_ * (target - high)
        second = consistent(denoiser(kept.add(first.eps, alpha=gain), target, **conditions))
        z = kept.add_(first.eps, alpha=gain / 2).add_(second.eps, alpha=gain / 2)
    if callback is not None:
        callback(Step(steps, sigmas[-1], z, None))
    return z


@dataclass(frozen=True)
class Solution:
    """Where a trajectory arrives, and what it took.

    Attributes:
        z: canonical state at the last sigma `[B, *shape]`.
        evaluations: network evaluations per sample (a guided denoiser's count 2).
        steps: accepted steps.
        rejected: steps taken again with a smaller size.
    """

    z: Tensor
    evaluations: int
    steps: int
    rejected: int


# Dormand & Prince (1980), 5(4), first same as last.
_NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


@torch.no_grad()
def solve(
    denoiser: Denoiser,
    sigma_from: float,
    sigma_to: float,
    z: Tensor,
    *,
    rtol: float = 1e-6,
    atol: float = 1e-6,
    cond: Mapping[str, Any] | None = None,
    max_evaluations: int = 10_000,
) -> Solution:
    """The probability-flow trajectory through z, from one noise level to another, down or up.

    An adaptive Runge-Kutta method (Dormand-Prince 5(4)) in theta = atan(sigma).  The batch shares its steps: the error
    of the worst sample, root mean square over its dimensions in units of `atol + rtol |z|`, decides.  Each step reads
    that number back from the device: this is for teachers and inversion, not for speed.

    Args:
        denoiser: the model.
        sigma_from: noise level of z, in [0, inf].
        sigma_to: where to go, in [0, inf].
        z: canonical states `[B, *shape]`; float64 for tolerances below 1e-5.
        rtol: relative tolerance per step.
        atol: absolute tolerance per step.
        cond: conditions, passed on to the denoiser by keyword.
        max_evaluations: where to give up.

    Raises:
        ValueError: if a level or tolerance leaves its range, z does not fit, the model is undefined at an end, or the
            denoiser moves the state (CFG++ has no trajectory).
        RuntimeError: if `max_evaluations` do not suffice, or the model answers with values that are not finite.
    """
    for name, sigma in (("sigma_from", sigma_from), ("sigma_to", sigma_to)):
        if not 0 <= sigma <= math.inf:
            raise ValueError(f"{name} = {sigma}: noise levels must be in [0, inf]")
        check_start(denoiser, sigma)
    check_range(denoiser, (sigma_from, sigma_to))
    z = start(denoiser, z, name="z")
    floor = 10 * torch.finfo(z.dtype).eps
    if not floor <= rtol < 1 or not 0 <= atol < math.inf:
        raise ValueError(
            f"rtol = {rtol}, atol = {atol}: in {z.dtype} needs {floor:.2g} <= rtol < 1 and 0 <= atol < inf; "
            "use a float64 state for tighter tolerances"
        )
    field = _Field(denoiser, conditions_of(denoiser, cond, len(z)), max_evaluations)
    t, end = math.atan(sigma_from), math.atan(sigma_to)
    field.exact = {t: sigma_from, end: sigma_to}
    span, steps, rejected = end - t, 0, 0
    if span == 0 or len(z) == 0:
        return Solution(z, 0, 0, 0)
    slope = field(z, t)
    h = 0.01 * span
    while t != end:
        last = abs(h) >= abs(end - t) * (1 - 1e-9)
        h = end - t if last else h
        z_new, error, final = _dormand_prince(field, z, t, h, end if last else t + h, slope)
        scale = atol + rtol * torch.maximum(z.abs(), z_new.abs())
        size = float((error / scale).flatten(1).square().mean(1).sqrt().max())
        if not math.isfinite(size):
            raise RuntimeError(
                f"the trajectory is not finite near sigma = {field.sigma(t):.6g}: the model's answers there have nan "
                "or inf; stay within its trained range, or run it in float32"
            )
        if size <= 1:
            t, z, slope, steps = (end if last else t + h), z_new, final, steps + 1
        else:
            rejected += 1
        h *= min(5.0, max(0.2, 0.9 * max(size, 1e-10) ** -0.2))
    return Solution(z, field.evaluations, steps, rejected)


class _Field:
    """dz/dtheta = alpha eps - s x0 of a denoiser, counted."""

    def __init__(self, denoiser: Denoiser, cond: Mapping[str, Any], budget: int) -> None:
        self.denoiser, self.cond, self.budget = denoiser, cond, budget
        self.evaluations = 0
        self.exact: dict[float, float] = {}

    def sigma(self, theta: float) -> float:
        """tan(theta), with the end points as they were given."""
        return self.exact.get(theta, math.tan(theta))

    def __call__(self, z: Tensor, theta: float) -> Tensor:
        sigma = self.sigma(theta)
        self.evaluations += self.denoiser.cost(sigma)
        if self.evaluations > self.budget:
            raise RuntimeError(
                f"{self.budget} evaluations reached sigma = {sigma:.6g} only: loosen rtol and atol, use a float64 "
                "state, or raise max_evaluations"
            )
        estimate = consistent(self.denoiser(z, sigma, **self.cond))
        alpha, s = alpha_s(sigma)
        if alpha == 0:
            return -estimate.x0.to(z)
        return estimate.eps.to(z) if s == 0 else (estimate.eps * alpha).sub_(estimate.x0, alpha=s).to(z)


def _dormand_prince(
    field: _Field, z: Tensor, t: float, h: float, t_end: float, slope: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step: the new state, the difference of the two orders, and the slope at the new state."""
    slopes, state = [slope], z
    for node, row in zip(_NODES[1:], _STAGES[1:], strict=True):
        state = z.clone()
        for weight, k in zip(row, slopes, strict=True):
            if weight:
                state.add_(k, alpha=h * weight)
        slopes.append(field(state, t_end if node == 1 else t + h * node))
    error = torch.zeros_like(z)
    for weight, k in zip(_ERROR, slopes, strict=True):
        if weight:
            error.add_(k, alpha=h * weight)
    return state, error, slopes[-1]


def consistent(estimate: Estimate) -> Estimate:
    """The estimate, if `z = alpha x0 + s eps` holds of it.

    Raises:
        ValueError: if it moves the state.
    """
    if estimate.state is not None:
        raise ValueError(
            "this denoiser moves the state (CFG++): it has no trajectory to follow; sample it with a plan, or guide "
            "by cfg"
        )
    return estimate
