"""Augmented: the ELBO of noise-augmented data that a monotone weighting is (2303.00848, Theorem 1).

With w never increasing on [lo, hi], w(lo) = 1, and p_w = -w'(l) dl + w(hi) at hi, a distribution of noise levels,

    -E_{l ~ p_w, q(z_l|x)} [ELBO_l(z_l)]  =  E_{p_w} [L(l; x)]  +  E_{p_w} [H(q(z_l|x))]

    L(l; x)       = KL(q(z_lo|x) || N(0, I)) + 1/2 int_lo^l E||eps_hat - eps||^2 dl'         (its eq. for dL/dt)
    H(q(z_l|x))   = D h(l),   h(l) = 1/2 ln(2 pi e sigmoid(-l)),   h'(l) = -1/2 sigmoid(l)

As p_w puts mass w(l) above l, both means are integrals against w itself, and no derivative of w is needed:

    prior   +   1/2 int w E||eps_hat - eps||^2 dl   +   D (h(lo) - 1/2 int w sigmoid(l) dl)
                weighted loss                           entropy of the added noise

The sum bounds -E log p(z_l) from above, in nats, z_l = alpha x + s eps the canonical noisy state, its level known.  It
is tight for the exact denoiser: then it is the cross-entropy of the augmented data.  The weighted loss alone is no
likelihood of anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser
from logsnr.devices import on
from logsnr.likelihood.control import Pilot
from logsnr.likelihood.integral import check_budget, integrate, prepare
from logsnr.likelihood.terms import check_levels, prior_nats
from logsnr.weightings import Weighting


@dataclass(frozen=True, kw_only=True)
class AugmentedELBO:
    """The negative noise-augmented ELBO in nats; every term is a mean over the samples.

    Attributes:
        nats: `prior + weighted_loss + entropy`, at least E[-log p(z)] over the augmentation.
        stderr: its standard error over noise and noise levels, the samples held fixed.
        data_stderr: the standard error that the choice of samples adds.
        weighted_loss: 1/2 int w E||eps_hat - eps||^2, w(lo) = 1.
        prior: KL to N(0, I) at the noisy end.
        entropy: mean entropy of the noise that the augmentation adds; without parameters.
        atom: share of the data at the least noise, w(hi)/w(lo).
        per_sample: `[N]` nats.
        logsnr_range: (lo, hi).
        evaluations: network evaluations spent, the pilot's included.
    """

    nats: float
    stderr: float
    data_stderr: float
    weighted_loss: float
    prior: float
    entropy: float
    atom: float
    per_sample: Tensor
    logsnr_range: tuple[float, float]
    evaluations: int

    def __str__(self) -> str:
        lo, hi = self.logsnr_range
        return (
            f"{self.nats:.4f} +- {self.stderr:.4f} nats, of data with noise of log-SNR [{lo:.2f}, {hi:.2f}] added "
            f"(weighted loss {self.weighted_loss:.4f}, prior {self.prior:.4f}, entropy {self.entropy:.4f})"
        )


@torch.no_grad()
def augmented_elbo(
    denoiser: Denoiser,
    x: Tensor,
    weighting: Weighting,
    *,
    logsnr_range: tuple[float, float],
    cond: dict[str, Tensor] | None = None,
    generator: torch.Generator,
    evaluations_per_image: int = 32,
    train: Tensor | None = None,
    pilot: Pilot | None = None,
    chunk: int = 512,
) -> AugmentedELBO:
    """Estimate the noise-augmented ELBO of samples under a monotone weighting.

    Args:
        denoiser: the model.
        x: samples `[N, *shape]` in the denoiser's units (`denoiser.encode(images)`).
        weighting: w, which must never increase on the range; its scale means nothing.
        logsnr_range: (lo, hi) noise levels of the objective.
        cond: conditions with one entry per sample.
        generator: source of every draw.
        evaluations_per_image: network evaluations per sample, a multiple of 8.
        train: other samples, for the Gaussian control.
        pilot: a pilot measured before on this range.
        chunk: samples per network call.

    Raises:
        ValueError: if w rises on the range, is zero or not finite at lo, or an argument does not fit.
    """
    if tuple(x.shape[1:]) != denoiser.shape or len(x) == 0 or not x.is_floating_point():
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}: give at least one sample of shape {denoiser.shape}, as floats"
        )
    check_budget(evaluations_per_image, None, 0)
    lo, hi = logsnr_range
    check_levels(denoiser, lo, hi, stacklevel=4)
    log_lo = float(weighting.log(lo))
    if not math.isfinite(log_lo):
        raise ValueError(f"{weighting!r} has no finite, positive w at lo = {lo}: move lo to where it has")
    if not weighting.is_monotone(lo, hi):
        raise ValueError(
            f"{weighting!r} rises somewhere on [{lo:g}, {hi:g}]: its mixture of noise levels is signed, and its loss "
            "bounds no likelihood; use weighting.envelope(), or a range on which it falls"
        )

    x, cond = on(x, denoiser.device), on(cond or {}, denoiser.device)

    def weight(logsnr: Tensor) -> Tensor:
        return (weighting.log(logsnr) - log_lo).exp()

    pilot = prepare(
        denoiser,
        x,
        pilot,
        train,
        logsnr_range=(lo, hi),
        cond=cond,
        generator=generator,
        chunk=chunk,
        evaluations_per_image=evaluations_per_image,
    )
    loss = integrate(
        denoiser,
        x,
        pilot,
        weight,
        cond=cond,
        generator=generator,
        chunk=chunk,
        evaluations_per_image=evaluations_per_image,
    )
    prior, n = prior_nats(x, lo).cpu(), len(x)
    entropy = denoiser.dim * _entropy(weight, lo, hi)
    per_sample = prior + loss.per_image + entropy
    return AugmentedELBO(
        nats=float(per_sample.mean()),
        stderr=loss.stderr,
        data_stderr=float(per_sample.std() / n**0.5) if n > 1 else math.inf,
        weighted_loss=float(loss.per_image.mean()),
        prior=float(prior.mean()),
        entropy=entropy,
        atom=float(weight(torch.tensor(hi, dtype=torch.float64))),
        per_sample=per_sample,
        logsnr_range=(lo, hi),
        evaluations=loss.evaluations_per_image * n + pilot.evaluations,
    )


def _entropy(weight: Callable[[Tensor], Tensor], lo: float, hi: float) -> float:
    """h(lo) - 1/2 int w sigmoid dlambda per dimension, by the trapezoidal rule on 200,001 points."""
    logsnr = torch.linspace(lo, hi, 200001, dtype=torch.float64)
    integral = float(torch.trapezoid(weight(logsnr) * logsnr.sigmoid(), logsnr))
    h_lo = 0.5 * (math.log(2 * math.pi * math.e) + float(torch.nn.functional.logsigmoid(-logsnr[0])))
    return h_lo - 0.5 * integral
