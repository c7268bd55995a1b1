"""gamma from the errors: the gradient-estimation weight that the covariance of consecutive errors asks for.

    g_t = (y_t - p) / sigma_t       the eps that goes straight from y_t to its projection, or to a known end point
    d_t = eps_t - g_t,  d'_t = eps_{t+1} - g_t       errors of the present and the previous output
    e_bar = gamma eps_t + (1 - gamma) eps_{t+1}

The paper takes e_bar as the minimiser of ||(e - eps_t, e - eps_{t+1})||_W^2, W = [[a, b], [b, c]] > 0, which is
gamma = (a + b)/(a + 2b + c), and leaves W open (2306.04848, sec. 5).  With W the inverse of the errors' covariance
[[E d.d, E d.d'], [E d.d', E d'.d']] it is the best linear unbiased estimate of g_t: gamma* has the least
E||e_bar - g_t||^2.  It is above 1 where the previous error points the way of the present one and is the larger.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser
from logsnr.noise import alpha_s
from logsnr.projection import ReferenceSet
from logsnr.sampling import Plan, Step, sample
from logsnr.sampling.batches import Cond


@dataclass(frozen=True, kw_only=True)
class StepCovariance:
    """Second moments, per dimension, of the errors of two consecutive outputs at one step.

    Attributes:
        sigma: noise level of the step.
        present: E d.d / n.
        previous: E d'.d' / n.
        cross: E d.d' / n.
    """

    sigma: float
    present: float
    previous: float
    cross: float

    @property
    def gamma(self) -> float:
        """The weight of the present output; 1 where both errors are the same, and every weight is as good."""
        return w_norm_gamma(*self.weights)

    @property
    def weights(self) -> tuple[float, float, float]:
        """(a, b, c) of W, the inverse of the covariance up to a factor."""
        return self.previous, -self.cross, self.present

    def error(self, gamma: float) -> float:
        """E||e_bar - g||^2 / n at a weight."""
        return gamma**2 * self.present + (1 - gamma) ** 2 * self.previous + 2 * gamma * (1 - gamma) * self.cross


def w_norm_gamma(a: float, b: float, c: float) -> float:
    """(a + b)/(a + 2b + c), the minimiser for W = [[a, b], [b, c]]; 1 where that is 0/0.

    Raises:
        ValueError: if W is not positive semi-definite up to rounding.
    """
    scale = max(a, c)
    if not (a >= 0 and c >= 0 and b * b <= a * c + 1e-9 * scale * scale):
        raise ValueError(f"W = [[{a}, {b}], [{b}, {c}]]: must be symmetric and positive (semi-)definite")
    total = a + 2 * b + c
    return (a + b) / total if total > 1e-12 * scale else 1.0


@torch.no_grad()
def error_covariance(
    denoiser: Denoiser,
    target: ReferenceSet | Tensor,
    plan: Plan,
    *,
    noise: Tensor,
    chunk: int = 256,
    cond: Cond | None = None,
) -> tuple[StepCovariance, ...]:
    """The covariance at every step of a plan that has a previous output, on the states that the plan visits.

    Args:
        denoiser: the model.
        target: the set that p is the projection on, at every state anew; or the end points `[N, *shape]` that the
            trajectories should have, of the same noise (a teacher's).
        plan: what to run; deterministic, from a finite sigma.
        noise: starting states `[N, *shape]`.
        chunk: trajectories at a time.
        cond: conditions, one entry per sample.

    Returns:
        n - 1 entries, for steps 1 ... n - 1: their `gamma` are what `solvers.ge` takes on a grid that stops above 0.

    Raises:
        ValueError: if the plan draws noise or starts at sigma inf, or end points do not fit the noise.
    """
    if plan.noisy or math.isinf(plan.sigmas[0]):
        raise ValueError(
            "the plan draws noise or starts at sigma = inf: errors need a deterministic plan, finite sigma"
        )
    if isinstance(target, Tensor) and target.shape != noise.shape:
        raise ValueError(f"end points of shape {tuple(target.shape)} for noise {tuple(noise.shape)}: one for each")
    sums = [[0.0, 0.0, 0.0] for _ in plan.rows]
    before: list[Tensor] = []

    def record(step: Step) -> None:
        if step.estimate is None:
            return
        y = (step.z.double() / alpha_s(step.sigma)[0]).flatten(1)
        p = target if isinstance(target, Tensor) else target.project(y.view(len(y), *target.shape))
        wanted = (y - p.flatten(1).double()) / step.sigma
        eps = step.estimate.eps.flatten(1).double()
        if before:
            now, then = eps - wanted, before.pop() - wanted
            for k, value in enumerate((now * now, then * then, now * then)):
                sums[step.index][k] = float(value.sum())
        before.append(eps)

    sample(denoiser, plan, noise=noise, cond=cond, chunk=chunk, callback=record)
    return tuple(
        StepCovariance(sigma=sigma, present=a / noise.numel(), previous=b / noise.numel(), cross=c / noise.numel())
        for sigma, (a, b, c) in zip(plan.sigmas[1:-1], sums[1:], strict=True)
    )
