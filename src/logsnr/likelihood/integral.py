"""Integral: 1/2 int g(lambda) E||eps_hat - eps||^2 dlambda of every image, with an honest standard error.

    1/2 1/K sum_k g(l_k)/p(l_k) (m_k - beta(l_k) . controls_k),     l_k the quantiles of p in K strata of [0, 1]

Image i takes one level in each of K equal strata, at positions that a fresh permutation of the images deals out, so
that over all images the whole range is covered in n K strata.  Nothing in this says how far the sum is off: the whole
of it is repeated in 8 replicates, and their spread is the standard error.  Each replicate is unbiased whatever the ones
before were, so p and beta may learn from them: the pilot can be small.  No antithetic noise: the error is nearly even
in eps, so that a pair +-eps says little more than one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser
from logsnr.likelihood.control import Draws, Pilot, draw_errors, gaussian_control

REPLICATES = 8
"""Repetitions of the whole estimate; their spread is the standard error."""
CURVE = 20
"""Bins of the loss curve."""


@dataclass(frozen=True, kw_only=True)
class Integral:
    """What was measured of the integral.

    Attributes:
        per_image: `[N]` nats.
        stderr: standard error of their mean over noise and noise levels, the images held fixed.
        evaluations_per_image: network evaluations behind it, the pilot's left out.
        curve: (log-SNR, E||eps_hat - eps||^2) in equal bins of the range, each `[20]`.
    """

    per_image: Tensor
    stderr: float
    evaluations_per_image: int
    curve: tuple[Tensor, Tensor]


def integrate(
    denoiser: Denoiser,
    x: Tensor,
    pilot: Pilot,
    weight: Callable[[Tensor], Tensor],
    *,
    cond: dict[str, Tensor] | None,
    generator: torch.Generator,
    chunk: int,
    evaluations_per_image: int,
    tolerance: float | None = None,
    max_evaluations_per_image: int = 1024,
) -> Integral:
    """Estimate the integral with weight g for every image.

    With a tolerance, rounds follow one another until the standard error (pooled over the rounds) is below it, each
    round as large as the last standard error calls for, at most doubling what was spent.
    """
    n = len(x)
    total, variance, spent = torch.zeros(n, dtype=torch.float64), 0.0, 0
    curve = torch.zeros(2, CURVE, dtype=torch.float64)
    strata = evaluations_per_image // REPLICATES
    while True:
        values = torch.zeros(REPLICATES, n, dtype=torch.float64)
        for replicate in values:
            share, draws = pilot.probabilities(weight), []
            for k in range(strata):
                deal = torch.randperm(n, generator=generator, device=generator.device)
                jitter = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)
                u = (k + (deal + jitter) / n) / strata
                logsnr, density = pilot.levels(u.to(x.device), share)
                error, known = draw_errors(
                    denoiser, x, logsnr, cond=cond, generator=generator, chunk=chunk, controls=pilot.controls
                )
                draws.append(Draws(logsnr=logsnr.cpu(), error=error.cpu(), known=known.cpu()))
                error = (error - (pilot.coefficients(logsnr) * known).sum(1)).cpu()
                inverse = 1 / density.cpu()
                replicate += 0.5 * weight(logsnr.cpu()) * inverse * error / strata
                _add_to_curve(curve, pilot, logsnr.cpu(), error, inverse)
            pilot = pilot.after(*draws)
        spent += strata
        total += strata * values.mean(0)
        variance += strata**2 * float(values.mean(1).var()) / REPLICATES
        stderr = math.sqrt(variance) / spent
        left = max_evaluations_per_image // REPLICATES - spent
        if tolerance is None or stderr <= tolerance or left < 1:
            break
        missing = math.ceil(spent * (1.1 * (stderr / tolerance) ** 2 - 1))
        strata = max(1, min(missing, spent, left))
    return Integral(
        per_image=total / spent, stderr=stderr, evaluations_per_image=spent * REPLICATES, curve=_curve(curve, pilot)
    )


def prepare(
    denoiser: Denoiser,
    x: Tensor,
    pilot: Pilot | None,
    train: Tensor | None,
    *,
    logsnr_range: tuple[float, float],
    cond: dict[str, Tensor] | None,
    generator: torch.Generator,
    chunk: int,
    evaluations_per_image: int,
) -> Pilot:
    """The pilot that was given, or one of about an eighth of the evaluations, with draws of its own on x, and with the
    Gaussian control (`gaussian_control`).

    Raises:
        ValueError: if the given pilot is for another range.
    """
    if pilot is not None:
        if any(abs(a - b) > 1e-9 for a, b in zip(pilot.range, logsnr_range, strict=True)):
            raise ValueError(f"the pilot knows log-SNR {pilot.range}, the bound has {logsnr_range}: measure another")
        return pilot
    size = min(max(len(x) * evaluations_per_image // 8, 192), 256)
    return Pilot.measure(
        denoiser,
        x,
        logsnr_range=logsnr_range,
        cond=cond,
        generator=generator,
        gaussian=gaussian_control(x, train),
        evaluations=size,
        chunk=chunk,
    )


def check_budget(evaluations_per_image: int, tolerance: float | None, max_evaluations_per_image: int) -> None:
    """Refuse a budget that the replicates cannot share.

    Raises:
        ValueError: if a number is not allowed.
    """
    if evaluations_per_image < REPLICATES or evaluations_per_image % REPLICATES:
        raise ValueError(
            f"evaluations_per_image = {evaluations_per_image}: give a positive multiple of {REPLICATES}, "
            "the number of replicates behind the standard error"
        )
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance = {tolerance}: give a positive standard error, e.g. .01, or None")
    if tolerance is not None and max_evaluations_per_image < evaluations_per_image:
        raise ValueError(
            f"max_evaluations_per_image = {max_evaluations_per_image} is below the first round's "
            f"evaluations_per_image = {evaluations_per_image}: raise it"
        )


def _add_to_curve(curve: Tensor, pilot: Pilot, logsnr: Tensor, error: Tensor, inverse: Tensor) -> None:
    lo, hi = pilot.range
    bins = ((logsnr - lo) / (hi - lo) * CURVE).long().clamp(max=CURVE - 1)
    curve[0].index_add_(0, bins, error * inverse)
    curve[1].index_add_(0, bins, inverse)


def _curve(curve: Tensor, pilot: Pilot) -> tuple[Tensor, Tensor]:
    """The mean error per bin; bins without a draw take the pilot's."""
    lo, hi = pilot.range
    centres = lo + (hi - lo) * (torch.arange(CURVE, dtype=torch.float64) + 0.5) / CURVE
    mean = curve[0] / curve[1].clamp(min=1e-300)
    if len(pilot.means):
        at = ((centres - lo) / (hi - lo) * len(pilot.means)).long()
        mean = torch.where(curve[1] > 0, mean, pilot.means[at])
    return centres, mean
